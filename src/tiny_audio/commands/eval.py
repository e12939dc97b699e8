"""`tiny-audio eval MODEL`: word error rate on a dataset, with a 95 % interval.

MODEL is a folder or Hub id of ours, or any speech recognition model of transformers. Writes
results.jsonl (raw and normalised texts, as it goes: the same command continues), results.txt
(worst first) and summary.json into --out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..asr_processing import AudioError, load_audio
from ..data import DataError, Example, read_source
from ..hub import git_hash
from ..scoring import count, normalizer, score
from .transcribe import load_pipeline

CHUNK = 32  # utterances between two writes


def transcribe(pipe: Any, examples: list[Example], options: dict[str, Any]) -> Iterator[dict]:
    """Results with `text`, or `error`, for each example, by our pipeline or transformers' own."""
    if pipe.model.config.model_type == "tiny_audio":
        yield from pipe.stream([e.audio for e in examples], skip_errors=True, **options)
        return
    for example in examples:
        try:
            audio = {"raw": load_audio(example.audio), "sampling_rate": 16_000}
        except AudioError as error:
            yield {"text": "", "error": str(error)}
            continue
        yield {"text": pipe(audio, return_timestamps=example.duration > 30)["text"].strip()}


def evaluate(
    pipe: Any,
    examples: list[Example],
    out: Path,
    options: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Transcribe and score `examples` into the folder `out`; what is there already is kept.

    Returns:
        The summary: see `scoring.score`, with `errors` (clips that could not be read), `seconds`
        of audio, `rtfx` (audio seconds per second of decoding) and `about`.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    rows: list[dict[str, Any]] = []
    if results.exists():
        rows = [json.loads(line) for line in results.read_text().splitlines() if line.endswith("}")]
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {row["id"] for row in rows}
    todo = sorted((e for e in examples if e.id not in known), key=lambda e: -e.duration)
    with results.open("a") as file, tqdm(total=len(examples), unit="clip", desc="eval") as bar:
        bar.update(len(rows))
        for i in range(0, len(todo), CHUNK):
            part = todo[i : i + CHUNK]
            started = time.perf_counter()
            answers = list(transcribe(pipe, part, options or {}))
            spent = (time.perf_counter() - started) / len(part)
            for example, answer in zip(part, answers, strict=True):
                row = {
                    "id": example.id,
                    "duration": example.duration,
                    "reference": example.text,
                    "prediction": answer["text"],
                    "decode_seconds": round(spent, 4),
                }
                row.update({k: answer[k] for k in ("error", "truncated") if k in answer})
                rows.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update(len(part))
            good = [r for r in rows if "error" not in r]
            if good:
                so_far = score([r["reference"] for r in good], [r["prediction"] for r in good])
                bar.set_postfix_str(f"WER {so_far['wer']:.1f} %")
    scored = [row for row in rows if "error" not in row]
    summary = score([r["reference"] for r in scored], [r["prediction"] for r in scored])
    seconds = sum(row["duration"] for row in scored)
    spent = sum(row["decode_seconds"] for row in scored)
    summary |= {
        "errors": len(rows) - len(scored),
        "truncated": sum(bool(row.get("truncated")) for row in rows),
        "seconds": round(seconds, 2),
        "rtfx": round(seconds / max(spent, 1e-9), 2),
        "device": str(pipe.model.device),
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "normalizer": "whisper english",
        "git_hash": git_hash(),
        **(about or {}),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "results.txt").write_text(report(rows))
    return summary


def report(rows: list[dict[str, Any]]) -> str:
    """Plain text of all utterances, worst first, clips that could not be read before them."""
    lines = []
    for row in (row for row in rows if "error" in row):
        lines.append(f"{row['id']}  ERROR {row['error']}\n")
    scored = []
    for row in (row for row in rows if "error" not in row):
        c = count(normalizer()(row["reference"]), normalizer()(row["prediction"]))
        scored.append((100 * c.errors / max(1, c.words), row))
    for rate, row in sorted(scored, key=lambda pair: -pair[0]):
        lines.append(f"{row['id']}  WER {rate:.1f} %  {row['duration']:.1f} s")
        lines.append(f"  ref: {row['reference']}\n  hyp: {row['prediction']}\n")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Score a model; 1 is returned when clips could not be read."""
    parser = argparse.ArgumentParser(
        prog="tiny-audio eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument(
        "--dataset",
        default="speechbrain/LoquaciousSet",
        help="manifest (.jsonl, .csv), folder of audio, or Hub dataset id (default: %(default)s)",
    )
    parser.add_argument("--name", help="configuration of a Hub dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--audio-column", default="audio")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--max-samples", type=int, metavar="N")
    parser.add_argument("--batch-seconds", type=float, default=60.0, help="audio decoded together")
    parser.add_argument("--out", type=Path, help="default: outputs/eval_<model>")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--decoder-only", action="store_true", help="leave out the CTC score")
    parser.add_argument("--ctc-only", action="store_true", help="the CTC head's greedy transcript")
    args = parser.parse_args(argv)
    columns = {"audio_column": args.audio_column, "text_column": args.text_column}
    if "LoquaciousSet" in args.dataset:
        columns = {"audio_column": "wav", "text_column": "text", "id_column": "ID"}
        args.name = args.name or "small"
    source = {"path": args.dataset, "name": args.name, "split": args.split, **columns}
    try:
        examples = []
        for example in read_source(source):
            examples.append(example)
            if len(examples) == args.max_samples:
                break
    except (DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = args.out or Path("outputs") / f"eval_{Path(args.model).name}"
    options: dict[str, Any] = {"batch_seconds": args.batch_seconds}
    if args.decoder_only:
        options["ctc_decode_weight"] = 0.0
    if args.ctc_only:
        options["ctc_only"] = True
    about = {
        "model": args.model,
        "dataset": args.dataset,
        "split": args.split,
        "command": "tiny-audio eval " + " ".join(sys.argv[1:] if argv is None else argv),
    }
    try:
        s = evaluate(load_pipeline(args.model, args.device), examples, out, options, about)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"WER {s['wer']:.2f} % [{s['wer_low']:.2f}, {s['wer_high']:.2f}] on {s['utterances']} "
        f"utterances, {s['words']} words: {s['substitutions']} substitutions, "
        f"{s['deletions']} deletions, {s['insertions']} insertions; CER {s['cer']:.2f} %; "
        f"RTFx {s['rtfx']}; errors {s['errors']}\n{out}/results.txt"
    )
    return 1 if s["errors"] else 0
