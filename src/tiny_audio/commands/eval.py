"""`tiny-audio eval MODEL`: word error rate on a dataset, with a 95 % interval.

MODEL is a folder or Hub id of ours, any speech recognition model of transformers, or a CTranslate2
Whisper folder. The dataset is a manifest (.jsonl, .csv), a folder of audio, a Hub dataset id, or
one of the short-form sets of the Open ASR Leaderboard: ami, earnings22, gigaspeech,
librispeech.clean, librispeech.other, spgispeech, tedlium, voxpopuli. Writes results.jsonl (as it
goes, in results-*.jsonl: the same command continues), results.txt (worst first), summary.json and
report.html (plots, and the worst clips to listen to) into --out.
"""

import argparse
import hashlib
import json
import resource
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub import dataset_info
from tqdm import tqdm

from ..asr_processing import SAMPLE_RATE, AudioError, load_audio
from ..data import SOURCE, DataError, Example, cut_batches, read_source
from ..hub import git_hash, one_line
from ..scoring import count, normalizer, score
from .recognisers import FasterWhisper, fingerprint, load_recogniser, recognise
from .report import write_report

Row = dict[str, Any]  # of results.jsonl; also options and summaries
PACKAGES = ["torch", "transformers", "datasets", "jiwer", "whisper-normalizer", "numpy"]
# Datasets by name: the short-form English sets of the Open ASR Leaderboard, and the default.
OPEN_ASR = {"path": "hf-audio/esb-datasets-test-only-sorted", "duration_column": "audio_length_s"}
SHORT = "ami earnings22 gigaspeech librispeech.clean librispeech.other spgispeech tedlium voxpopuli"
SETS: dict[str, Row] = {}
for short in SHORT.split():
    config, *part = short.split(".")
    SETS[short] = {**OPEN_ASR, "name": config, "split": ".".join(["test", *part])}
LOQUACIOUS = "speechbrain/LoquaciousSet"
SETS[LOQUACIOUS] = {"name": "small", "audio_column": "wav", "id_column": "ID"}
NO_REFERENCE = "ignore time segment in scoring"  # TED-LIUM's mark of what is not to be scored


def batches(examples: list[Example], seconds: float) -> Iterator[list[Example]]:
    """Longest first, cut where padding to the longest exceeds `seconds`; at least one clip each."""
    if not examples:
        return
    lengths = np.array([example.duration for example in examples])
    order = np.argsort(-lengths, kind="stable")
    for batch in cut_batches(np.maximum(1.0, lengths), order, seconds, len(examples)):
        yield [examples[i] for i in batch]


def decode(pipe: Any, batch: list[Example], options: Row) -> Iterator[Row]:
    """Rows of results.jsonl for one batch; a clip that fails has `error` instead of `wer`."""
    started, normal = time.perf_counter(), normalizer(pipe.language)
    clips: dict[str, Any] = {}
    answers: dict[str, Row] = {}
    for example in batch:
        try:
            clips[example.id] = load_audio(example.audio)
        except AudioError as error:
            answers[example.id] = {"text": "", "error": str(error)}
    if clips:
        found = recognise(pipe, list(clips.values()), options)
        answers.update(zip(clips, found, strict=True))
    spent = (time.perf_counter() - started) / len(batch)
    for example in batch:
        answer = answers[example.id]
        row = {"id": example.id, "duration": len(clips.get(example.id, ())) / SAMPLE_RATE}
        row |= {"reference": example.text, "prediction": answer.pop("text"), **answer}
        row["decode_seconds"] = round(spent, 4)
        if "error" not in row:
            row["normalized"] = [normal(row["reference"]), normal(row["prediction"])]
            c = count(*row["normalized"])
            row |= {"word_errors": c.errors, "words": c.words}
            row["wer"] = 100 * c.errors / max(1, c.words)
        yield row


def earlier_rows(path: Path) -> dict[str, Row]:
    """Rows by id that a stopped evaluation has left in `path`, without those that failed."""
    text = path.read_text() if path.exists() else ""
    text = text[: text.rfind("\n") + 1]  # a killed run leaves half a line
    path.write_text(text)
    rows = map(json.loads, text.splitlines())
    return {row["id"]: row for row in rows if "error" not in row}


def evaluate(
    pipe: Any, clips: list[Example], out: Path, options: Row | None = None, about: Row | None = None
) -> Row:
    """Transcribe and score `clips` into the folder `out`; what is there already is kept.

    Args:
        pipe: what `load_recogniser` returns.
        options: of our pipeline; `batch_seconds` (default 60) holds for every model.
        about: what else is to be in the summary.

    Returns:
        The summary: see `scoring.score`, with `errors` (clips that could not be read or decoded),
        `seconds` of audio, `rtfx` (audio seconds per second of reading and decoding), the peak
        memory (of the GPU where there is one, else of the process), and all that it ran with.

    Raises:
        ValueError: when no clip could be scored.
    """
    options, about = {"batch_seconds": 60.0, **(options or {})}, dict(about or {})
    command = about.pop("command", "")
    out.mkdir(parents=True, exist_ok=True)
    packages = PACKAGES + ["faster-whisper"] * isinstance(pipe, FasterWhisper)
    settings = {
        **about,
        "model_revision": pipe.revision,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "language": pipe.language,
        "normalizer": f"whisper {'english' if pipe.language == 'en' else 'basic'}",
        "options": {key: value for key, value in options.items() if key != "batch_seconds"},
        "git_hash": git_hash(),
        "versions": {name: version(name) for name in packages},
    }
    seen: Counter[str] = Counter()
    for clip in clips:  # an id that is there twice is told apart
        seen[clip.id] += 1
        clip.id += f"#{seen[clip.id]}" if seen[clip.id] > 1 else ""
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    work = out / f"results-{mark}.jsonl"  # of these settings: what others left is not mixed in
    done = earlier_rows(work)
    rows = {clip.id: done[clip.id] for clip in clips if clip.id in done}
    left = [clip for clip in clips if clip.id not in rows]
    scored = [*rows.values()]
    errors, words = (sum(row[key] for row in scored) for key in ("word_errors", "words"))
    seconds = sum(clip.duration for clip in left) + 1e-3
    bar = tqdm(total=seconds, unit="s", unit_scale=True, desc="audio")
    with work.open("a") as file, bar:
        for batch in batches(left, options["batch_seconds"]):
            for row in decode(pipe, batch, options):
                rows[row["id"]] = row
                errors, words = errors + row.get("word_errors", 0), words + row.get("words", 0)
                file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update(sum(clip.duration for clip in batch))
            wer = 100 * errors / max(1, words)
            bar.set_postfix_str(f"WER {wer:.1f} %, {len(rows)} of {len(clips)} clips")
    ordered = [rows[clip.id] for clip in clips]  # as if nothing had come between
    scored = [row for row in ordered if "error" not in row]
    failed = [row for row in ordered if "error" in row]
    if not scored:
        raise ValueError(f"no utterance was scored; {failed[0]['error'] if failed else 'no data'}")
    seconds = sum(row["duration"] for row in scored)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory *= 1 if sys.platform == "darwin" else 1024
    summary = {
        **score([r["reference"] for r in scored], [r["prediction"] for r in scored], pipe.language),
        "errors": len(failed),
        "truncated": sum("truncated" in row for row in scored),
        "seconds": round(seconds, 2),
        "rtfx": round(seconds / max(sum(row["decode_seconds"] for row in scored), 1e-9), 2),
        "batch_seconds": options["batch_seconds"],
        "device": str(pipe.device),
        "peak_memory_gb": round((torch.cuda.max_memory_allocated() or memory) / 1e9, 2),
        **settings,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }
    worst = failed + sorted(scored, key=lambda row: -row["wer"])
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered))
    (out / "results.txt").write_text("\n".join(map(lines, worst)))
    write_report(out, summary, worst, {clip.id: clip.audio for clip in clips})
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def lines(row: Row) -> str:
    """One utterance of results.txt."""
    result = f"ERROR {row['error']}" if "error" in row else f"WER {row['wer']:.1f} %"
    texts = f"  ref: {row['reference']}\n  hyp: {row['prediction']}\n"
    return f"{row['id']}  {result}  {row['duration']:.1f} s\n{texts}"


def read_examples(args: argparse.Namespace) -> tuple[list[Example], Row]:
    """The examples that the command line names, and where they come from, as resolved.

    Raises:
        DataError: when there is no such data, or it has no references.
    """
    given = {key: value for key, value in vars(args).items() if key in SOURCE and value is not None}
    source = {"path": args.dataset, "split": "test", **SETS.get(args.dataset, {}), **given}
    path = Path(args.dataset).expanduser()
    revision = fingerprint([path]) if path.is_file() else None
    examples = []
    try:
        if not path.exists() and not path.suffix.startswith((".js", ".csv", ".tsv")):
            source["revision"] = dataset_info(source["path"], revision=args.revision).sha
        for example in read_source(source):
            if example.text.strip().lower().replace("_", " ") != NO_REFERENCE:
                examples.append(example)
            if len(examples) == args.max_samples:
                break
    except (DatasetsError, httpx.HTTPError, ValueError, OSError) as error:
        why = one_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise DataError(f"{args.dataset} cannot be read: {why}") from error
    if not any(example.text.strip() for example in examples):
        raise DataError(f"{args.dataset}: all references are empty; is --text-column right?")
    about = {"model": args.model, "dataset": args.dataset, "source": source}
    return examples, {**about, "dataset_revision": source.get("revision", revision)}


def main(argv: list[str] | None = None) -> int:
    """Score a model; 1 is returned when clips could not be read."""
    parser = argparse.ArgumentParser(prog="tiny-audio eval", description=__doc__)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--dataset", default=LOQUACIOUS, help="default: %(default)s")
    parser.add_argument("--name", help="configuration of a Hub dataset")
    parser.add_argument("--split", help="default: test")
    parser.add_argument("--revision", help="commit of a Hub dataset; default: the newest")
    parser.add_argument("--audio-column")
    parser.add_argument("--text-column")
    parser.add_argument("--language", default="en", help="en, de, ...; default: %(default)s")
    parser.add_argument("--max-samples", type=int, metavar="N")
    parser.add_argument("--batch-seconds", type=float, default=60.0, help="audio decoded together")
    parser.add_argument("--out", type=Path, help="default: outputs/eval_<model>_<dataset>")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--decoder-only", action="store_true", help="leave out the CTC score")
    parser.add_argument("--ctc-only", action="store_true", help="the CTC head's greedy transcript")
    args = parser.parse_args(argv)
    options = {"batch_seconds": args.batch_seconds, "ctc_only": args.ctc_only}
    if args.decoder_only:
        options["ctc_decode_weight"] = 0.0
    out = args.out or Path(f"outputs/eval_{Path(args.model).name}_{Path(args.dataset).stem}")
    try:
        examples, about = read_examples(args)
        about["command"] = shlex.join(["tiny-audio", "eval", *(argv or sys.argv[1:])])
        pipe = load_recogniser(args.model, args.device, args.language)
        s = evaluate(pipe, examples, out, options, about)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"WER {s['wer']:.2f} % [{s['wer_low']:.2f}, {s['wer_high']:.2f}], CER {s['cer']:.2f} %, "
        f"{s['utterances']} clips, {s['words']} words; {s['substitutions']} substituted, "
        f"{s['deletions']} deleted, {s['insertions']} inserted; RTFx {s['rtfx']}; {s['errors']} "
        f"clips failed\n{out}/report.html"
    )
    return 1 if s["errors"] else 0
