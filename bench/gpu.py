"""Measure training, decoding and resuming on a GPU at full size, without weights or data.

    python bench/gpu.py                          # about 7 minutes on an H100, no network needed
    python bench/gpu.py --tiny                   # the same at toy sizes, 3 minutes on a CPU
    python bench/gpu.py --parts decoding         # one part; done parts are skipped
    python bench/gpu.py --assets ~/.cache/tiny-audio --minutes 5   # also a real training run

The base models have the sizes of `+experiments=stage1` and random weights, initialised on the
device. The clips are noise with random texts, as long as those of LoquaciousSet (8.4 s on average).
Everything else is the product's own code: recipe, data, trainer and search.

Each part runs in its own process with a time limit, so a part that fails or hangs affects no other.
Results are written after each part. Repeating the command runs only the parts that are missing. The
report is `gpu.json` and `gpu.md` in --out; `gpu.log` is the log of all parts.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import made_up
import numpy as np
import torch
from made_up import ROOT, Bench
from parts import Part, Row, run_all, run_here
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tiny_audio.asr.asr_bases import cast_base
from tiny_audio.asr.asr_decoding import transcribe
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_search import PrefixSearch, silent_frames, squeeze
from tiny_audio.commands import parser_of
from tiny_audio.commands.plan import OWN, plan_stage
from tiny_audio.evaluation.scoring import score
from tiny_audio.hub import one_line
from tiny_audio.training import plan
from tiny_audio.training import train as runner
from tiny_audio.training.build import build_processor
from tiny_audio.training.checks import read_log
from tiny_audio.training.manifests import Example
from tiny_audio.training.parts import freeze_idle
from tiny_audio.training.run_log import LOG
from tiny_audio.training.trainer import LOSS_KEYS
from tiny_audio.training.vocabulary import transcript_ngram

STAGES = ("projector", "lora")


def attempt(about: Row, measure: Callable[[], Row]) -> Row:
    """Run `measure`; return `about` with its figures, or with its error."""
    try:
        return about | measure()
    except Exception as error:
        return about | {"error": f"{type(error).__name__}: {one_line(error)}"[:200]}


# -- training --------------------------------------------------------------------------------------


def train_stage(
    bench: Bench, name: str, steps: int, changes: tuple[str, ...] = (), adapt: Any = None
) -> list[Row]:
    """Train a stage of the recipe with the product's `run_stage`; return the rows of its log.

    Args:
        bench: sizes and folders.
        name: name of the stage.
        steps: number of optimizer steps.
        changes: overrides of the recipe.
        adapt: called with the model before training.
    """
    lengths = [f"stages.{i}.training.max_steps={steps}" for i in range(len(STAGES))]
    cfg = bench.stage(name, *lengths, *changes)
    cost, folder = runner.expected_cost, bench.work / "run" / name
    shutil.rmtree(folder.parent, ignore_errors=True)

    def prepared(model: ASRModel, settings: Row) -> None:
        freeze_idle(model, settings)
        if adapt:
            adapt(model)

    def counted(model: ASRModel, settings: Row, examples: Any) -> tuple[float, str]:
        if name not in bench.counted:  # do not count recomputation by checkpointing as work
            plain = {**settings, "gradient_checkpointing": False}
            bench.counted[name] = cost(model, plain, examples)
        return bench.counted[name]

    own = patch.multiple(runner, freeze_idle=prepared, expected_cost=counted)
    with made_up.weights(bench.device), own:
        runner.run_stage(cfg, folder, None)
    return read_log(folder / LOG)


def speed(bench: Bench, *options: Any) -> Row:
    """Measure a short run after its warm-up."""
    warm, measured = bench.size((3, 12), (1, 3))
    bench.start_counting()
    rows = train_stage(bench, options[0], warm + measured, *options[1:])
    spent = np.diff([row["seconds"] for row in rows])  # the first row is the warm-up

    def mean(key: str) -> float:
        return float(np.average([row[key] for row in rows[1:]], weights=spent))

    found = {"audio-s/s": mean("audio_seconds_per_second")}
    if "mfu" in rows[0]:
        found["MFU %"] = 100 * mean("mfu")
    found |= {"waiting %": 100 * mean("waiting"), "padding %": 100 * mean("padding")}
    return found | {"s a step": float(spent.sum()) / measured} | bench.memory()


def compile_layers(model: ASRModel) -> None:
    """Apply torch.compile layer by layer, so that equal layers share the compiled code."""
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    for layer in [*model.encoder.encoder.layers, *model.decoder.model.layers]:
        layer.compile(dynamic=True, backend=backend)


# Stage, name, overrides, change of the model. Variants that may crash the process come last.
VARIANTS: list[tuple[str, str, tuple[str, ...], Any]] = [
    ("projector", "the recipe", (), None),
    ("projector", "no gradient checkpointing", ("training.gradient_checkpointing=false",), None),
    ("lora", "the recipe", (), None),
    ("lora", "no gradient checkpointing", ("training.gradient_checkpointing=false",), None),
    ("lora", "four times the batch", ("training.batch_seconds=240",), None),
    ("lora", "AdamW, not fused", ("training.optim=adamw_torch",), None),
    ("lora", "data not streamed", ("data.streaming=false",), None),
    ("lora", "torch.compile, by layer", (), compile_layers),
]


def training(bench: Bench) -> Iterator[Row]:
    """Measure both stages of the recipe, and variants of them."""
    for stage, name, changes, adapt in VARIANTS:
        about = {"stage": stage, "variant": name}
        yield attempt(about, partial(speed, bench, stage, changes, adapt))


# -- planning --------------------------------------------------------------------------------------


def planned_model(bench: Bench, name: str) -> tuple[Any, ASRModel, Row]:
    """Return the plan of a stage, the same model on the device, and a batch of the planned size."""
    cfg, seconds = bench.stage(name), bench.mean
    runner.fit_device(cfg.training)
    own = {**OWN, "seconds": seconds, "text_rate": made_up.TOKENS_A_SECOND}
    planned, processor = plan_stage(cfg, own), build_processor(cfg)
    config = copy.copy(planned.model.config)
    config.encoder_name, config.decoder_name = (str(bench.work / part) for part in made_up.SIZES)
    config.audio_token_id, config.end_token_id = processor.audio_token_id, processor.end_token_id
    dtype = cfg.training.dtype and getattr(torch, cfg.training.dtype)
    with made_up.weights(bench.device):
        made = ASRModel.from_base(config, dtype=dtype).to(bench.device)  # type: ignore[arg-type]
    freeze_idle(made, cfg.training)
    noise, _ = made_up.noise_and_texts(bench, [seconds], seed=0)
    target = list(range(300, 300 + round(made_up.TOKENS_A_SECOND * seconds)))
    letters = [1 + i % 30 for i in range(2 * len(target))]
    features = processor.features(noise[0])
    clips: Any = (planned.clips * [item] for item in (features, target, letters))
    return planned, made.train(), dict(processor.collate(*clips).to(bench.device))


def planned_and_measured(bench: Bench, name: str) -> Row:
    """Measure one step of a stage on clips of equal length, and compare it with the plan."""
    planned, model, batch = planned_model(bench, name)
    settings = planned.cfg.training
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=bench.device == "cuda")
    weights = {key: settings[key] for key in LOSS_KEYS}

    def step() -> None:
        with torch.autocast(bench.device, torch.bfloat16, enabled=settings.bf16):
            loss = model(**batch, **weights).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # creates the optimizer states
    bench.start_counting()
    step()
    found = bench.memory()
    recorder = plan.Recorder()
    recorder.track([*model.parameters(), *model.buffers()])
    states = (state.values() for state in optimizer.state.values())
    recorder.track([tensor for some in states for tensor in some])
    with recorder:
        step()
    found |= {"tensors GB": recorder.most / 1e9, "plan GB": planned.gb}
    found["memory, measured / plan"] = found.get("allocated GB", found["tensors GB"]) / planned.gb
    gflop = recorder.flops.total() / 1e9 / (planned.clips * bench.mean)
    work = {"GFLOP/s": gflop, "plan GFLOP/s": planned.gflop}
    return found | work | {"work, measured / plan": gflop / planned.gflop}


def planning(bench: Bench) -> Iterator[Row]:
    """Compare the memory and work of a step with the estimates of `tiny-audio plan`."""
    for name in STAGES:
        bench.start_counting()
        yield {"stage": name} | planned_and_measured(bench, name)


# -- decoding --------------------------------------------------------------------------------------


def decoder_model(bench: Bench) -> tuple[Any, ASRModel]:
    """Create a processor and a model on the device, with both heads and a large n-gram."""
    cfg, rng, words = bench.stage("lora"), np.random.default_rng(2), made_up.lexicon(bench)
    runner.fit_device(cfg.training)
    processor, model = made_up.model(bench, cfg)
    texts = [made_up.sentence(words, 20, rng) for _ in range(bench.size(20_000, 200))]
    examples = [Example("", None, text, 1.0) for text in texts]
    model.ngram = transcript_ngram(processor, examples, bench.work / "words.tsv")
    model.characters = made_up.FixedPosteriors(model.characters)
    return processor, model.to(bench.device).eval()  # type: ignore[arg-type]


def seconds_of(bench: Bench, function: Callable[[], Any]) -> float:
    """The shorter time of two calls, after a warm-up call."""
    function()
    times = [bench.now()]
    for _ in range(2):
        function()
        times.append(bench.now())
    return float(np.diff(times).min())


def decode_batch(bench: Bench, processor: Any, model: Any, clips: int) -> Row:
    """Measure each part of decoding a batch of clips of about average length."""
    rng = np.random.default_rng(3)
    lengths = bench.mean * rng.uniform(0.8, 1.2, clips)
    noise, texts = made_up.noise_and_texts(bench, lengths.tolist(), seed=3)
    batch = processor(noise).to(bench.device)
    inputs = batch["input_features"], batch["input_features_mask"]
    with torch.inference_mode():
        found = {"encode s": seconds_of(bench, lambda: model.encode(*inputs))}
        hidden, steps = model.encode(*inputs)
        some = [made_up.posteriors(processor.spell(text), hidden.shape[1], rng) for text in texts]
        model.characters.log_probs = torch.stack(some).float().to(bench.device)
        given = model.characters.log_probs, steps
        search = model.search(model.config.decoding)
        on_cpu = PrefixSearch(made_up.ALPHABET, copy.copy(model.ngram), search.settings)
        found["search s"] = seconds_of(bench, lambda: search(*given))
        found["search on CPU s"] = seconds_of(bench, lambda: on_cpu(*given))
        most = {"max_new_tokens": max(1, round(made_up.TOKENS_A_SECOND * lengths.max()))}
        for decode in ("ctc", "rescore", "generate"):
            options = {"generate_kwargs": most} if decode == "generate" else {}
            decoded = partial(transcribe, model, processor, hidden, steps, decode, **options)
            found[f"{decode} s"] = seconds_of(bench, decoded)
        hypotheses = [t.text for t in transcribe(model, processor, hidden, steps, "ctc")]
        frames, _ = squeeze(given[0], steps, silent_frames(given[0], steps))
    audio = float(lengths.sum())
    for decode in ("ctc", "rescore", "generate"):
        found[f"{decode} audio-s/s"] = audio / (found["encode s"] + found[f"{decode} s"])
    found["search % of rescore"] = 100 * found["search s"] * found["rescore audio-s/s"] / audio
    found["frames searched %"] = 100 * frames.shape[1] / hidden.shape[1]
    return found | {"WER % of the search": score(texts, hypotheses)["wer"]} | bench.memory()


def decoding(bench: Bench) -> Iterator[Row]:
    """Measure encoding, search, rescoring and free generation at several batch sizes."""
    processor, model = decoder_model(bench)
    for clips in bench.size((1, 8, 32), (1, 4)):
        bench.start_counting()
        yield {"clips": clips} | decode_batch(bench, processor, model, clips)


# -- precision -------------------------------------------------------------------------------------


def gradients(bench: Bench, model: Any, batch: Row, weights: Row, half: bool) -> dict[str, Tensor]:
    """Loss and gradients of a batch by part, flattened to float32 on the CPU."""
    model.zero_grad()
    with torch.autocast(bench.device, torch.bfloat16, enabled=half):
        loss = model(**batch, **weights).loss
    loss.backward()
    found: dict[str, list[Tensor]] = {"loss": [loss.detach()]}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            lora = " LoRA" if ".lora_" in name else ""
            found.setdefault(name.split(".")[0] + lora, []).append(parameter.grad.flatten())
    return {part: torch.cat([x.float().reshape(-1).cpu() for x in some])
            for part, some in found.items()}  # fmt: skip


def precision(bench: Bench) -> Iterator[Row]:
    """Compare loss and gradients in bfloat16 with float32; then train for a hundred steps."""
    steps = bench.size(100, 10)
    cfg = bench.stage("lora", "training.dtype=null", "training.attn_implementation=sdpa")
    processor, model = made_up.model(bench, cfg)
    model.to(bench.device).eval()  # no dropout, so both compute the same
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:  # initialised to zero, which would zero lora_A's gradient
                parameter.normal_(std=0.02)
    clips, texts = made_up.noise_and_texts(bench, [bench.mean] * 4, seed=4)
    batch = dict(processor(clips, texts).to(bench.device))
    weights = {key: cfg.training[key] for key in LOSS_KEYS}
    exact = gradients(bench, model, batch, weights, half=False)
    for part in (model.encoder, model.decoder):  # as `ASRModel.from_pretrained` does
        cast_base(part, torch.bfloat16)
    half = gradients(bench, model, batch, weights, half=True)
    for part, x in exact.items():
        sizes = float(x.norm()), float(half[part].norm())
        row = {"what": part, "float32": sizes[0], "bfloat16": sizes[1]}
        row["relative difference"] = abs(sizes[1] / sizes[0] - 1)
        yield row | {"cosine": float(F.cosine_similarity(x, half[part], dim=0))}
    del model, exact, half
    bench.start_counting()
    changes = ("training.batch_seconds=30",) * (not bench.tiny)
    losses = [row["loss"] for row in train_stage(bench, "lora", steps, changes)]
    found = {"what": "loss of a run", "finite": bool(np.isfinite(losses).all()), "steps": steps}
    yield found | {"first": losses[0], "last": losses[-1]}


# -- resuming, learning ----------------------------------------------------------------------------


def start_training(overrides: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Start `python src/train.py`."""
    command = [sys.executable, str(ROOT / "src/train.py"), *overrides]
    env = {**os.environ, **environment}
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=env)


def killed_and_resumed(toy: Bench) -> Row:
    """Compare the losses of a killed and resumed run with those of an uninterrupted one."""
    steps, killed_at = 24, 10
    saves = ["training.save_strategy=steps", "training.save_steps=6", "training.logging_steps=1"]
    saves += ["stages.0.training.max_steps=3", f"stages.1.training.max_steps={steps}"]
    common = [*toy.overrides(), *saves, "model.tune=false"]
    logs = {name: toy.work / name / "lora" / LOG for name in ("whole", "killed")}
    commands = {name: [*common, f"run.output_dir={toy.work / name}"] for name in logs}
    whole = start_training(commands["whole"], toy.work / "whole.txt")
    killed = start_training(commands["killed"], toy.work / "killed.txt")
    while len(read_log(logs["killed"])) < killed_at:
        if killed.poll() is not None:
            raise RuntimeError(f"the run ended early: {(toy.work / 'killed.txt').read_text()}")
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    again = start_training(commands["killed"], toy.work / "killed.txt")
    if whole.wait() or again.wait():
        texts = [(toy.work / f"{name}.txt").read_text()[-500:] for name in logs]
        raise RuntimeError(f"exit codes {whole.returncode}, {again.returncode}: {texts}")
    assert "continuing from" in (toy.work / "killed.txt").read_text()
    losses = [[row["loss"] for row in read_log(log) if "loss" in row] for log in logs.values()]
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    found = {"steps": steps, "killed after": killed_at, "first loss": losses[0][0]}
    return found | {"last loss": losses[0][-1], "largest difference": worst, "same": worst < 1e-3}


def resume(bench: Bench) -> Iterator[Row]:
    """Kill a small run and resume it with the same command."""
    toy = Bench(bench.work / "toy", True)
    toy.work.mkdir()
    made_up.make_bases(toy)
    made_up.make_clips(toy)
    for part, kind in (("encoder", AutoModel), ("decoder", AutoModelForCausalLM)):
        folder = toy.work / part
        kind.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    yield {"run": "toy size"} | killed_and_resumed(toy)


def learning(bench: Bench) -> Iterator[Row]:
    """Train the quickstart for some minutes; report the evaluation WER over time."""
    if bench.assets is None or not (Path(bench.assets) / "speech/train.jsonl").exists():
        yield {"skipped": "needs --assets, the cache folder of `make quickstart`"}
        return
    run = bench.work / "learning"
    steps = [f"stages.{i}.training.{what}_steps={n}" for i, n in ((0, 100), (2, 20))
             for what in ("eval", "save")]  # fmt: skip
    own = ["+experiments=quickstart", f"run.output_dir={run}", "model.tune=false", *steps]
    started = time.monotonic()
    process = start_training(own, bench.work / "learning.txt", TINY_AUDIO_CACHE=bench.assets)
    with suppress(subprocess.TimeoutExpired):
        process.wait(60 * bench.minutes)
    process.terminate()  # it saves a checkpoint and exits with code 75
    process.wait()
    print((bench.work / "learning.txt").read_text())
    for stage in ("characters", "align", "decoder"):
        for row in read_log(run / stage / LOG):
            if "eval_wer" in row:
                about = {"stage": stage, "step": row["step"], "seconds": row["seconds"]}
                yield about | {"loss": row["eval_loss"], "WER %": row["eval_wer"]}
    yield {"exit code": process.returncode, "seconds": time.monotonic() - started}


# -- the command -----------------------------------------------------------------------------------

MADE_UP = "Made-up posteriors of random sentences, since random weights would output noise."
PARTS = {
    "training": Part(training, 300, "Clips of 8.4 s on average. MFU excludes recomputation."),
    "plan": Part(planning, 90, "Clips of one length; a CTC head over all tokens, as in `plan`."),
    "decoding": Part(decoding, 100, MADE_UP),
    "precision": Part(precision, 100, "Norms of loss and gradients of a batch, without dropout."),
    "resume": Part(resume, 100, "kill -9 during training, then the same command again."),
    "learning": Part(learning, 600, "The quickstart's recipe."),
}


def main() -> int:
    """Run the requested parts that are not done; return 1 if a part failed."""
    parser = parser_of("python bench/gpu.py", __doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu_<date>")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--assets", type=Path, help="the quickstart's cache, for `learning`")
    parser.add_argument("--minutes", type=float, default=3.0, help="length of `learning`")
    parser.add_argument("--limit", type=float, help="time limit of every part, in seconds")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        name, settings = args.run
        options = json.loads(Path(settings).read_text())
        bench = Bench(Path(settings).parent, options["tiny"], options["assets"], options["minutes"])
        return run_here(PARTS[name], bench.work / f"{name}.jsonl", bench)
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    options = {key: vars(args)[key] for key in ("tiny", "minutes", "limit")}
    options["assets"] = args.assets and str(args.assets.expanduser())
    out = args.out or ROOT / f"bench/results/gpu_{date.today()}"
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        bench = Bench(Path(work), args.tiny)
        made_up.make_bases(bench)
        made_up.make_clips(bench)
        return run_all(PARTS, names, out, bench.work, options)


if __name__ == "__main__":
    sys.exit(main())
