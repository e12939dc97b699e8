"""Training speed on real clips: audio-seconds per CPU-second, ours against the field's plain way.

    python bench/training_speed.py --threads 1 --seconds 60

Each row trains the same model (the quickstart's Whisper base encoder + SmolLM2-135M, LoRA on the
decoder) on the quickstart's recorded clips for a while, the encoder run in the loop. The plain way
is random batches of 8, clips padded to 30 s, logits at every position; our three changes are then
added one by one. Each row runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "plain: random batches of 8, padded to 30 s, full logits": {},
    "+ length-budget batches": {"length_batches": True},
    "+ clips at their real length": {"length_batches": True, "real_length": True},
    "+ logits at labels only (our decoder stage)": {
        "length_batches": True,
        "real_length": True,
        "label_logits": True,
    },
    "our CTC stage": {"length_batches": True, "real_length": True, "ctc": True},
}


def measure(variant: dict[str, Any], threads: int, seconds: float, batch_seconds: float) -> dict:
    """Train for `seconds` of CPU time after one warm-up step; figures of the run."""
    import torch
    from hydra import compose, initialize_config_dir

    from tiny_audio.data import Dropped, LengthBatchSampler, SpeechDataset
    from tiny_audio.train import CONFIGS, build_model, build_processor, ctc_vocabulary

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("config", ["+experiments=quickstart"])
    processor = build_processor(cfg)
    data = SpeechDataset([dict(cfg.data.train[0])], processor, Dropped(), max_seconds=29.0)
    if not variant.get("real_length"):
        processor.min_seconds, processor.tail_seconds = 30.0, 0.0
    model = build_model(cfg, processor, ctc_vocabulary(data)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    durations = [example.duration for example in data.examples]
    if variant.get("length_batches"):
        budget = 64.0 if variant.get("ctc") else batch_seconds
        batches = list(LengthBatchSampler(durations, budget))
    else:
        order = random.Random(0).sample(range(len(durations)), len(durations))
        batches = [order[i : i + 8] for i in range(0, len(order), 8)]
    weights = (0.0, 1.0) if variant.get("ctc") else (1.0, 0.2)
    audio = padded = 0.0
    steps, started = -1, 0.0
    while steps < 1 or time.process_time() - started < seconds:
        batch = data.collate([data[i] for i in batches[(steps + 1) % len(batches)]])
        inputs = {k: v for k, v in batch.items() if k not in ("ids", "seconds", "dropped")}
        loss = model(
            **inputs,
            decoder_loss_weight=weights[0],
            ctc_loss_weight=weights[1],
            character_loss_weight=1.0 if variant.get("ctc") else 0.0,
            full_logits=not variant.get("label_logits") and not variant.get("ctc"),
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps == 0:
            started = time.process_time()  # the first step warms up
            continue
        audio += batch["seconds"]
        padded += batch["input_features"].shape[-1] / 100 * len(batch["ids"])
    return {
        "audio_per_cpu_second": audio / (time.process_time() - started),
        "padding": 1 - audio / padded,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "steps": steps,
    }


def main() -> None:
    """Measure every variant and print a Markdown table, also into bench/results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds for each row")
    parser.add_argument("--batch-seconds", type=float, default=32.0, help="decoder stage's budget")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        figures = measure(VARIANTS[args.only], args.threads, args.seconds, args.batch_seconds)
        print(json.dumps(figures))
        return
    lines = [
        f"Training speed, {date.today()}, {args.threads} thread(s), CPU, fp32; "
        f"`python bench/training_speed.py --threads {args.threads} --seconds {args.seconds:g} "
        f"--batch-seconds {args.batch_seconds:g}`\n",
        "| way | audio-s per CPU-s | ratio to plain | padding | peak memory |",
        "|---|---|---|---|---|",
    ]
    plain = None
    for name in VARIANTS:
        command = [sys.executable, __file__, "--only", name, "--threads", str(args.threads)]
        command += ["--seconds", str(args.seconds), "--batch-seconds", str(args.batch_seconds)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(out.splitlines()[-1])
        plain = plain or row["audio_per_cpu_second"]
        lines.append(
            f"| {name} | {row['audio_per_cpu_second']:.2f} | "
            f"{row['audio_per_cpu_second'] / plain:.1f}x | {100 * row['padding']:.0f} % | "
            f"{row['peak_gb']:.1f} GB |"
        )
        print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / f"training_speed_{date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
