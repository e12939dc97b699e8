"""Compare training speed with the usual method, in audio seconds per CPU second on real clips.

    python bench/training_speed.py --clips 64
    python bench/training_speed.py --table memory

Each row trains the same model (the quickstart's Whisper base encoder + SmolLM2-135M, LoRA on the
decoder) once on the same clips, drawn from the quickstart's recordings, without cached encoder
frames. The usual method has random batches of 8, clips padded to 30 s, and logits at every
position. The next rows add our three changes one by one. The table `memory` shows the cost or gain
of logits at labels only, gradient checkpointing and encoder LoRA. Each row runs in its own process,
to measure its peak memory separately.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

BATCH_SECONDS = 32.0  # batch_seconds of the quickstart's decoder stage
OURS = {"length_batches": True, "real_length": True, "label_logits": True}
CTC = {"decoder_loss_weight": 0.0, "ctc_loss_weight": 1.0, "character_loss_weight": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain: random batches of 8, padded to 30 s, full logits": {},
    "+ clips at their real length": {"real_length": True},
    "+ length-budget batches": {**OURS, "label_logits": False},
    "+ logits at labels only (our decoder stage)": OURS,
    "our CTC stage": {**OURS, "ctc": CTC},
}
HEAD = "| way | audio-s per CPU-s | ratio | CPU-s a step | padding | logits | peak memory |"
ROW = "| {name} | {speed:.2f} | {ratio:.2f}x | {step:.1f} | {padding:.0%} "
ROW += "| {logits_mb:.0f} MB | {peak_gb:.1f} GB |"
MEMORY: dict[str, dict[str, Any]] = {
    "decoder LoRA, logits at labels only": OURS,
    "full logits": {**OURS, "label_logits": False},
    "gradient checkpointing": {**OURS, "checkpointing": True},
    "encoder LoRA": {**OURS, "encoder_lora": True},
    "encoder LoRA, gradient checkpointing": {**OURS, "encoder_lora": True, "checkpointing": True},
}


def measure(variant: dict[str, Any], clips: int) -> dict[str, float]:
    """Train one epoch on `clips` clips after a warm-up step; return the figures of the run."""
    import torch
    from torch.nn import functional as F

    from tiny_audio.commands.eval import peak_memory
    from tiny_audio.training.batches import LengthBatchSampler
    from tiny_audio.training.data import Dropped, SpeechDataset
    from tiny_audio.training.train import build_model, build_processor, compose_recipe
    from tiny_audio.training.vocabulary import ctc_vocabulary

    torch.manual_seed(0)
    rank = f"encoder_lora.r={8 if variant.get('encoder_lora') else 0}"
    cfg = compose_recipe(["+experiments=quickstart", rank])
    processor = build_processor(cfg)
    data = SpeechDataset([{"path": cfg.data.train[0].path}], processor, Dropped(), max_seconds=29.0)
    data.examples = random.Random(0).sample(data.examples, clips)
    if not variant.get("real_length"):
        processor.min_seconds, processor.tail_seconds = 30.0, 0.0
    model = build_model(cfg, processor, ctc_vocabulary(data.examples)).train()
    if variant.get("checkpointing"):
        model.gradient_checkpointing_enable()
    logits: list[int] = []  # bytes of the logits in each step
    head = model.decoder.get_output_embeddings()
    head.register_forward_hook(lambda module, given, output: logits.append(output.nbytes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # frozen ones get no gradient
    durations = [example.duration for example in data.examples]
    if variant.get("length_batches"):
        batches = list(LengthBatchSampler(durations, 64.0 if "ctc" in variant else BATCH_SECONDS))
    else:
        batches = [list(range(i, min(i + 8, clips))) for i in range(0, clips, 8)]
    audio = padded = started = 0.0
    for step, rows in enumerate([batches[0], *batches]):
        batch = data.collate([data[i] for i in rows])
        about = ("ids", "seconds", "sources", "dropped")
        inputs = {k: v for k, v in batch.items() if k not in about}
        settings = variant.get("ctc", {"ctc_loss_weight": 0.2})
        if variant.get("label_logits"):
            loss = model(**inputs, **settings).loss
        else:  # logits at every position, without the CTC loss
            labels = inputs.pop("labels")
            out = model(**inputs, **settings).logits
            loss = F.cross_entropy(
                out[:, :-1].flatten(0, 1), labels[:, -out.shape[1] + 1 :].flatten()
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            started = time.process_time()  # the first step is a warm-up
            continue
        audio += batch["seconds"]
        padded += batch["input_features"].shape[-1] / 100 * len(batch["ids"])
    spent = time.process_time() - started
    return {
        "speed": audio / spent,
        "padding": 1 - audio / padded,
        "peak_gb": peak_memory(),
        "logits_mb": max(logits, default=0) / 1e6,
        "step": spent / len(batches),
    }


def main() -> None:
    """Measure every variant; print a Markdown table and write it to bench/results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=64, help="number of clips to train on")
    parser.add_argument("--table", choices=("speed", "memory"), default="speed")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    variants = VARIANTS if args.table == "speed" else MEMORY
    if args.only:
        print(json.dumps(measure(variants[args.only], args.clips)))
        return
    options = f"--table {args.table} --clips {args.clips}"
    rows: dict[str, dict[str, float]] = {}
    for name in variants:
        command = [sys.executable, __file__, "--only", name, *options.split()]
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one).stdout
        rows[name] = json.loads(out.splitlines()[-1])
        print(name, rows[name], flush=True)
    base = next(iter(rows.values()))["speed"]
    lines = [
        f"Training {args.table}, {date.today()}, CPU, fp32, one thread; "
        f"`python bench/training_speed.py {options}`\n",
        HEAD,
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(ROW.format(name=name, ratio=row["speed"] / base, **row))
    path = Path(__file__).parent / "results" / f"training_{args.table}_{date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
