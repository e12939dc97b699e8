"""Compare training speed with the usual method, in audio seconds per CPU second on real clips.

    python bench/training_speed.py --clips 64
    python bench/training_speed.py --encoder ~/.cache/tiny-audio/whisper-tiny.en

Each row trains the same model (the quickstart's Whisper base encoder + SmolLM2-135M, LoRA on the
decoder) once on the same clips, drawn from the quickstart's recordings, without cached encoder
frames. The usual method has random batches of 8, clips padded to 30 s, logits at every position,
and a decoder that reads padded rows. The next rows add our four changes one by one. The decoder of
an aligned model reads no blank frames; for that row, one frame is kept for each token of the
transcript. Each row runs in its own process, to measure its peak memory. "of the machine" compares
the FLOPs of the clips, without those of padding, with a multiplication of two large matrices on the
same core.
"""

import contextlib
import random
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tiny_audio.commands import parser_of
from tiny_audio.commands.eval import peak_memory
from tiny_audio.training.batches import LengthBatchSampler
from tiny_audio.training.build import build_model, build_processor
from tiny_audio.training.checks import Dropped
from tiny_audio.training.data import SpeechDataset
from tiny_audio.training.recipe import compose_recipe
from tiny_audio.training.vocabulary import ctc_vocabulary

BATCH_SECONDS = 32.0  # batch_seconds of the quickstart's decoder stage
OURS = {"length_batches": True, "real_length": True, "label_logits": True, "packed": True}
CTC = {"decoder_loss_weight": 0.0, "ctc_loss_weight": 1.0, "character_loss_weight": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain: random batches of 8, padded to 30 s, full logits": {},
    "+ clips at their real length": {"real_length": True},
    "+ length-budget batches": {**OURS, "label_logits": False, "packed": False},
    "+ logits at labels only": {**OURS, "packed": False},
    "+ packed clips (our decoder stage)": OURS,
    "our decoder stage, aligned model": {**OURS, "aligned": True},
    "our CTC stage": {**OURS, "ctc": CTC},
}
HEAD = "| way | audio-s per CPU-s | ratio | of the machine | padding | peak memory |"
ROW = "| {name} | {speed:.2f} | {ratio:.2f}x | {share:.0%} | {padding:.0%} | {peak_gb:.1f} GB |"


def matrix_rate() -> float:
    """GFLOP per CPU second of a product of two matrices of size 1024."""
    a, started = torch.randn(1024, 1024), time.process_time()
    for _ in range(50):
        a = (a @ a).clamp(-1, 1)
    return 50 * 2 * 1.024**3 / (time.process_time() - started)


def keep_tokens(model: Any, labels: Any) -> None:
    """Let the bridge of an untrained model keep one frame per token, as it does once aligned."""
    bridge, tokens = type(model).bridge, (labels >= 0).sum(1, keepdim=True)

    def aligned(*args: Any) -> Any:
        audio, keep = bridge(model, *args)
        return audio, keep.new_ones(keep.shape).cumsum(1) <= tokens

    model.bridge = aligned


def run_padded(model: Any, embeds: Any, mask: Any, start: int) -> Any:
    """`run_decoder` over padded rows, each with its own start."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    read = {"inputs_embeds": embeds, "attention_mask": mask.long(), "position_ids": positions}
    own = mask & (mask.cumsum(1) > start)
    return model.decoder.base_model(**read, use_cache=False).last_hidden_state[own], own


def loss_of(model: Any, inputs: dict[str, Any], settings: dict[str, Any], at_labels: Any) -> Any:
    """The loss of a step, with logits at the labels alone or, without the CTC loss, everywhere."""
    if at_labels:
        return model(**inputs, **settings).loss
    labels = inputs.pop("labels")
    out = model(**inputs, **settings).logits
    return F.cross_entropy(out[:, :-1].flatten(0, 1), labels[:, -out.shape[1] + 1 :].flatten())


def measure(variant: dict[str, Any], encoder: str, clips: int) -> dict[str, float]:
    """Train one epoch on `clips` clips after a warm-up step; return the figures of the run."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    changes = [f"model.encoder_model_name={encoder}"] if encoder else []
    cfg = compose_recipe(["+experiments=quickstart", *changes])
    processor = build_processor(cfg)
    data = SpeechDataset([{"path": cfg.data.train[0].path}], processor, Dropped(), max_seconds=29.0)
    data.examples = random.Random(0).sample(data.examples, clips)
    if not variant.get("real_length"):
        processor.min_seconds, processor.tail_seconds = 30.0, 0.0
    model = build_model(cfg, processor, ctc_vocabulary(data.examples)).train()
    if not variant.get("packed"):
        model.run_decoder = partial(run_padded, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # frozen ones get no gradient
    if variant.get("length_batches"):
        budget = 64.0 if "ctc" in variant else BATCH_SECONDS
        batches = list(LengthBatchSampler(data.lengths, budget))
    else:
        batches = [list(range(i, min(i + 8, clips))) for i in range(0, clips, 8)]
    audio = padded = started = gflop = 0.0
    for step, rows in enumerate([batches[0], *batches]):
        batch = data.collate([data[i] for i in rows])
        inputs = {k: v for k, v in batch.items() if k not in ("ids", "seconds", "dropped")}
        settings = variant.get("ctc", {"ctc_loss_weight": 0.2})
        if variant.get("aligned"):
            keep_tokens(model, inputs["labels"])
        counter = FlopCounterMode(display=False)
        with counter if step == 0 else contextlib.nullcontext():
            loss_of(model, inputs, settings, variant.get("label_logits")).backward()
        optimizer.step()
        optimizer.zero_grad()
        with_padding = batch["input_features"].shape[-1] / 100 * len(batch["ids"])
        if step == 0:  # a warm-up
            gflop = counter.get_total_flops() / 1e9 / with_padding
            started = time.process_time()
            continue
        audio += batch["seconds"]
        padded += with_padding
    spent = time.process_time() - started
    return {
        "speed": audio / spent,
        "padding": 1 - audio / padded,
        "peak_gb": peak_memory(),
        "share": gflop * audio / spent / matrix_rate(),
    }


def main() -> None:
    """Measure every variant; print a Markdown table and write it to bench/results."""
    parser = parser_of("python bench/training_speed.py", __doc__)
    parser.add_argument("--clips", type=int, default=64, help="number of clips to train on")
    parser.add_argument("--encoder", default="", help="folder; default: the quickstart's")
    args = parser.parse_args()
    encoder = Path(args.encoder).name or "quickstart"
    each = {"max_workers": 1, "max_tasks_per_child": 1, "mp_context": get_context("spawn")}
    with ProcessPoolExecutor(**each) as pool:
        one_by_one = partial(measure, encoder=args.encoder, clips=args.clips)
        rows = dict(zip(VARIANTS, pool.map(one_by_one, VARIANTS.values()), strict=True))
    base = next(iter(rows.values()))["speed"]
    lines = [
        f"Training speed, {date.today()}, CPU, fp32, one thread; "
        f"encoder: {encoder}; `python bench/training_speed.py --clips {args.clips}`\n",
        HEAD,
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(ROW.format(name=name, ratio=row["speed"] / base, **row))
    path = Path(__file__).parent / "results" / f"training_speed_{encoder}_{date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
