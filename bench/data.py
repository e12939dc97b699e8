"""Measure the padding of length-budget batches, the speed of loading, and the time to resume.

    OMP_NUM_THREADS=1 python bench/data.py

Padding: measured on the quickstart's clips, and compared with random batches of the same sizes.

Loading: CPU time on one core for decoding, and for decoding plus features.

Resuming: time from the line with the checkpoint's name to the line of the next step, for a toy
model on an epoch of 12,000 rows. The checkpoint of step 50 is real. The checkpoint of step 5,000 is
a copy with the step changed and, for a stream, the position after 5,000 batches.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import soundfile
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer

from tiny_audio.asr.asr_encoder import build_encoder
from tiny_audio.asr.asr_processing import SAMPLE_RATE, load_audio
from tiny_audio.commands import assets
from tiny_audio.commands.plan import recipe_stages
from tiny_audio.training.batches import LengthBatchSampler
from tiny_audio.training.data import Clips, Dropped
from tiny_audio.training.manifests import read_source
from tiny_audio.training.stream import START, SpeechStream
from tiny_audio.training.train import CONFIGS, build_processor

FORMATS = {"WAV": ("wav", "PCM_16"), "FLAC": ("flac", "PCM_16"),
           "MP3": ("mp3", "MPEG_LAYER_III"), "Opus": ("ogg", "OPUS")}  # fmt: skip
SECONDS, BLOCK, MOST = 8.0, 500, 2  # batch seconds, block and clips per batch of the resumed run


def padding(cached: assets.Assets, folder: Path) -> list[str]:
    """Measure the padded share of an epoch's seconds at three budgets."""
    manifests = (cached.train, cached.train.with_name("synthetic.jsonl"))
    clips = [example for path in manifests for example in read_source({"path": str(path)})]
    seconds = np.array([example.duration for example in clips if example.duration < 30])
    order = np.random.default_rng(0).permutation(len(seconds))
    lines = [f"{len(seconds):,} clips, {seconds.min():.1f} to {seconds.max():.1f} s, mean "
             f"{seconds.mean():.1f} s\n", "| budget | batches | padding | in random batches |",
             "|---|---|---|---|"]  # fmt: skip
    for budget in (32, 64, 120):
        batches = list(LengthBatchSampler(seconds, budget))
        cuts = np.cumsum([len(batch) for batch in batches])[:-1]
        shares = [
            1 - seconds.sum() / sum(len(batch) * seconds[batch].max() for batch in way)
            for way in (batches, np.split(order, cuts))
        ]
        lines.append(f"| {budget} s | {len(batches)} | {shares[0]:.1%} | {shares[1]:.1%} |")
    return lines


def loading(cached: assets.Assets, folder: Path) -> list[str]:
    """Measure clips per second on one core, for each audio format."""
    clips = [clip for clip in read_source({"path": str(cached.dev)}) if clip.duration < 29]
    reader = Clips(build_processor(recipe_stages(["+experiments=quickstart"])[0]), Dropped())
    lines = [f"{len(clips)} clips, mean {np.mean([c.duration for c in clips]):.1f} s, 16 kHz\n",
             "| format | decoded, clips/s | with features, clips/s |", "|---|---|---|"]  # fmt: skip
    samples = [load_audio(clip.audio) for clip in clips]
    for name, (suffix, kind) in FORMATS.items():
        for i, clip in enumerate(clips):
            clip.audio = str(folder / f"{i}.{suffix}")
            soundfile.write(clip.audio, samples[i], SAMPLE_RATE, subtype=kind)
        rates = []
        for read in (lambda clip: load_audio(clip.audio), reader.read):
            times = []
            for _ in range(3):  # take the best time
                started = time.process_time()
                for clip in clips:
                    assert not isinstance(out := read(clip), dict) or "features" in out, out
                times.append(time.process_time() - started)
            rates.append(len(clips) / min(times))
        lines.append(f"| {name} | {rates[0]:.0f} | {rates[1]:.0f} |")
    return lines


def toy_run(cached: assets.Assets, folder: Path) -> list[str]:
    """Create toy models and data in `folder`; return overrides for a run of over 5,000 batches."""
    config = AutoConfig.from_pretrained(cached.decoder)
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    config.update({**sizes, "num_hidden_layers": 2, "intermediate_size": 96})
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "decoder")
    AutoTokenizer.from_pretrained(cached.decoder).save_pretrained(folder / "decoder")
    config = AutoConfig.from_pretrained(cached.encoder)
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 64}
    config.update({**sizes, "encoder_attention_heads": 2})
    build_encoder(config).save_pretrained(folder / "encoder")
    AutoFeatureExtractor.from_pretrained(cached.encoder).save_pretrained(folder / "encoder")
    clips = [clip for clip in read_source({"path": str(cached.dev)}) if 1 < clip.duration < 3]
    rows = [
        {"id": str(i), "audio": clip.audio, "text": clip.text, "duration": clip.duration}
        for i, clip in enumerate(islice(cycle(clips), 12_000))
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *(f"model.{part}_model_name={folder / part}" for part in ("encoder", "decoder")),
        f"data.train=[{{path: {folder / 'm.jsonl'}}}]", "model.projector_hidden=32",
        f"training.batch_seconds={SECONDS}", f"data.max_seconds={SECONDS}", f"data.block={BLOCK}",
        f"training.per_device_train_batch_size={MOST}", "training.dataloader_num_workers=0",
        "training.max_steps=6000", "training.logging_steps=1", "training.save_steps=50",
        "training.eval_strategy=no", "training.report_to=none", f"run.output_dir={folder}/run",
    ]  # fmt: skip


def until(command: list[str], word: str) -> float:
    """Run until a line contains `word`, then kill the run.

    Returns the seconds since the line "continuing from", or since the start if there is none.
    """
    command = [sys.executable, "-u", str(CONFIGS.parents[3] / "src/train.py"), *command]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout or ():
            if "continuing from" in line:
                started = time.monotonic()
            if word in line:
                run.kill()
                return time.monotonic() - started
    raise RuntimeError(f"the run ended before {word!r}: {run.returncode}")


def pretend(folder: Path, command: list[str], streaming: bool) -> None:
    """Copy the checkpoint of step 50 and turn the copy into one of step 5,000."""
    path = shutil.copytree(folder, folder.with_name("checkpoint-5000"))
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps({**state, "global_step": 5000}))
    if not streaming:
        return
    cfg = recipe_stages([*command, "data.streaming=true"])[0]
    processor = build_processor(cfg)
    limits = {"min_seconds": cfg.data.min_seconds, "max_seconds": SECONDS, "seed": cfg.run.seed}
    stream = SpeechStream(cfg.data.train, processor, Dropped(), SECONDS, BLOCK, MOST, **limits)
    position, left = dict(START), 5000
    readers = stream.open(position)
    while left > (n := len(stream.batches(stream.read_block(readers, position, []), position))):
        position, left = stream.following(readers, position), left - n
    position["emitted"] = left
    (path / "stream-0.json").write_text(json.dumps(position))


def resuming(cached: assets.Assets, folder: Path) -> list[str]:
    """Measure the seconds to the first step after checkpoints of step 50 and step 5,000."""
    lines = ["| data | step 50 | step 5,000 |", "|---|---|---|"]
    command = toy_run(cached, folder)
    for streaming in (False, True):
        own = [*command, f"data.streaming={streaming}"]
        until([*own, "run.fresh=true"], "step    51/")
        checkpoint = folder / "run/train/checkpoint-50"
        pretend(checkpoint, own, streaming)
        times: dict[int, list[float]] = {50: [], 5000: []}
        for step in [50, 5000] * 5:  # alternate, so that other load affects both
            resume = f"training.resume_from_checkpoint={checkpoint.with_name(f'checkpoint-{step}')}"
            times[step].append(until([*own, resume], f"step {step + 1:>5}/"))
        row = [f"{median(t):.2f} s ({min(t):.2f} to {max(t):.2f})" for t in times.values()]
        lines.append(f"| {'a stream' if streaming else 'all there'} | {' | '.join(row)} |")
    return lines


def main() -> None:
    """Measure all three; print Markdown tables and write them to bench/results."""
    torch.set_num_threads(1)
    cached = assets.prepare()
    path = Path(__file__).parent / f"results/data_{date.today()}.md"
    with tempfile.TemporaryDirectory() as scratch, path.open("w") as file:
        file.write(f"Data, {date.today()}, CPU; `OMP_NUM_THREADS=1 python bench/data.py`\n\n")
        for measure in (padding, loading, resuming):
            lines = measure(cached, Path(scratch))
            file.write("\n".join(lines) + "\n\n")
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
