"""`tiny-audio eval MODEL`: measure the word error rate on a dataset, with a 95 % interval.

MODEL is the folder or Hub id of a tiny-audio model, of any speech recognition model of
transformers, or a CTranslate2 Whisper folder. The dataset is a manifest (.jsonl, .csv), a folder of
audio, a Hub dataset id, or a short-form set of the Open ASR Leaderboard: ami, earnings22,
gigaspeech, librispeech.clean, librispeech.other, spgispeech, tedlium, voxpopuli. Writes
results.jsonl, results.txt (worst first), summary.json and report.html (plots, and players for the
worst clips) into --out. An interrupted command continues from results-*.jsonl when repeated.
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
from huggingface_hub import dataset_info

from ..asr.asr_audio import SAMPLE_RATE, AudioError, load_audio
from ..asr.asr_config import DECODE
from ..errors import one_line
from ..evaluation.recognisers import FasterWhisper, fingerprint, load_recogniser, recognise
from ..evaluation.report import write_report
from ..evaluation.scoring import count, normalizer, score
from ..hub import git_hash
from ..progress import progress_bar
from ..training.batches import cut_batches
from ..training.checks import read_log
from ..training.manifests import SOURCE, DataError, Example, audio_checksum, read_source
from . import home_path, parser_of
from .transcribe import DECODE_HELP

Row = dict[str, Any]  # a row of results.jsonl, options, or a summary
PACKAGE = Path(__file__).parents[1]
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
NO_REFERENCE = "ignore time segment in scoring"  # TED-LIUM's mark for segments not to score


def decode(pipe: Any, batch: list[Example], options: Row) -> Iterator[Row]:
    """Transcribe a batch; yield a row of results.jsonl for each clip, with `error` on failure."""
    started = time.perf_counter()
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
        row = {"id": example.id, "audio": audio_checksum(example.audio)}
        row |= {"duration": len(clips.get(example.id, ())) / SAMPLE_RATE}
        row |= {"reference": example.text, "prediction": answer.pop("text"), **answer}
        yield row | {"decode_seconds": round(spent, 4)}


def with_errors(row: Row, language: str) -> Row:
    """Add the normalised texts of a row, its word errors and its WER, unless it failed."""
    if "error" in row:
        return row
    texts = [normalizer(language)(row[key]) for key in ("reference", "prediction")]
    errors, words = count(*texts)
    wer = 100 * errors / max(1, words)
    return row | {"normalized": texts, "word_errors": errors, "words": words, "wer": wer}


def peak_memory() -> float:
    """Peak memory in GB: of the GPU if one is used, otherwise of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (torch.cuda.max_memory_allocated() or resident) / 1e9


def evaluate(
    pipe: Any, clips: list[Example], out: Path, options: Row | None = None, about: Row | None = None
) -> Row:
    """Transcribe and score `clips`, and write the results into the folder `out`.

    Clips that an interrupted evaluation transcribed with the same settings are not repeated.

    Args:
        pipe: a recogniser from `load_recogniser`.
        clips: the examples to score.
        out: folder of the results.
        options: options of our pipeline; `batch_seconds` (default 60) applies to every model.
        about: further entries of the summary.

    Returns:
        The summary: the figures of `scoring.score`, `errors` (clips that could not be read or
        decoded), `seconds` of audio, `rtfx` (audio seconds per second of reading and decoding),
        peak memory, and all settings.

    Raises:
        ValueError: if no clip could be scored.
    """
    options, about = {"batch_seconds": 60.0, **(options or {})}, dict(about or {})
    command = about.pop("command", "")
    out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(pipe, options, about)
    seen: Counter[str] = Counter()
    for clip in clips:  # make repeated ids unique
        seen[clip.id] += 1
        clip.id += f"#{seen[clip.id]}" if seen[clip.id] > 1 else ""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    progress = out / f"results-{digest}.jsonl"  # an interrupted run continues from this file
    rows = transcribe_all(pipe, clips, progress, options)
    scored = [row for row in rows if "error" not in row]
    failed = [row for row in rows if "error" in row]
    if not scored:
        raise ValueError(f"no clip was scored: {failed[0]['error'] if failed else 'no data'}")
    seconds = sum(row["duration"] for row in scored)
    summary = {
        **score([r["reference"] for r in scored], [r["prediction"] for r in scored], pipe.language),
        "errors": len(failed),
        "truncated": sum("truncated" in row for row in scored),
        "seconds": round(seconds, 2),
        "rtfx": round(seconds / max(sum(row["decode_seconds"] for row in scored), 1e-9), 2),
        "batch_seconds": options["batch_seconds"],
        "device": str(pipe.device),
        "peak_memory_gb": round(peak_memory(), 2),
        **settings,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }
    worst = failed + sorted(scored, key=lambda row: -row["wer"])
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "results.txt").write_text("\n".join(map(as_text, worst)))
    write_report(out, summary, worst, {clip.id: clip.audio for clip in clips})
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def settings_of(pipe: Any, options: Row, about: Row) -> Row:
    """Everything that may affect the texts: model, options, code and library versions."""
    packages = PACKAGES + ["faster-whisper"] * isinstance(pipe, FasterWhisper)
    return {
        **about,
        "model_revision": pipe.revision,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "language": pipe.language,
        "normalizer": f"whisper {'english' if pipe.language == 'en' else 'basic'}",
        "options": {key: value for key, value in options.items() if key != "batch_seconds"},
        "git_hash": git_hash(),
        "code": fingerprint(sorted(PACKAGE.rglob("*.py"))),  # also of changes not committed yet
        "versions": {name: version(name) for name in packages},
    }


def transcribe_all(pipe: Any, clips: list[Example], work: Path, options: Row) -> list[Row]:
    """Transcribe clips, longest first, and append each batch's rows to the file `work`.

    Skips clips that `work` already contains with the same audio. Returns the rows in the order of
    `clips`.
    """
    text = work.read_text() if work.exists() else ""
    work.write_text(text[: text.rfind("\n") + 1])  # drop the partial line of a killed run
    done = {row["id"]: row for row in read_log(work) if "error" not in row}
    rows = {
        clip.id: with_errors({**done[clip.id], "reference": clip.text}, pipe.language)
        for clip in clips
        if clip.id in done and done[clip.id].get("audio") == audio_checksum(clip.audio)
    }
    if rows:
        print(f"{len(rows)} of {len(clips)} clips were transcribed before, see {work}")
    left = [clip for clip in clips if clip.id not in rows]
    lengths = np.array([max(1.0, clip.duration) for clip in left])
    cuts = cut_batches(lengths, options["batch_seconds"])
    bar = progress_bar(total=lengths.sum() + 1e-3, unit="s", unit_scale=True, desc="audio")
    with work.open("a") as file, bar:
        for batch in cuts:
            for row in decode(pipe, [left[i] for i in batch], options):
                rows[row["id"]] = with_errors(row, pipe.language)
                file.write(json.dumps(row) + "\n")
            file.flush()
            wrong = sum(row.get("word_errors", 0) for row in rows.values())
            wer = 100 * wrong / max(1, sum(row.get("words", 0) for row in rows.values()))
            bar.postfix = f"WER {wer:.1f} %, {len(rows)} of {len(clips)} clips"
            bar.update(lengths[batch].sum())
    return [rows[clip.id] for clip in clips]


def as_text(row: Row) -> str:
    """Format one utterance for results.txt."""
    result = f"ERROR {row['error']}" if "error" in row else f"WER {row['wer']:.1f} %"
    texts = f"  ref: {row['reference']}\n  hyp: {row['prediction']}\n"
    return f"{row['id']}  {result}  {row['duration']:.1f} s\n{texts}"


def read_examples(args: argparse.Namespace) -> tuple[list[Example], Row]:
    """Read the examples that the command line names; also return their resolved source.

    Raises:
        DataError: if the data cannot be read or has no references.
    """
    given = {key: value for key, value in vars(args).items() if key in SOURCE and value is not None}
    source = {"path": args.dataset, "split": "test", **SETS.get(args.dataset, {}), **given}
    path = Path(args.dataset).expanduser()
    local = path.exists() or path.suffix in (".json", ".jsonl", ".csv", ".tsv")
    tables = path.is_dir() and not any(path.glob("metadata.*"))  # a Hub dataset, downloaded
    if local and not tables and (unfit := given.keys() & {"name", "split", "revision"}):
        raise DataError(f"{path} is local: only a Hub dataset takes --{', --'.join(sorted(unfit))}")
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{path} is empty")
    examples = []
    try:
        if not local:
            source["revision"] = dataset_info(source["path"], revision=args.revision).sha
        for example in read_source(source):
            if example.text.strip().lower().replace("_", " ") != NO_REFERENCE:
                examples.append(example)
            if len(examples) == args.max_samples:
                break
    except (DataError, httpx.HTTPError, ValueError, OSError) as error:
        where = "" if local else " as a dataset of the Hub, and there is no such file"
        raise DataError(f"{args.dataset} cannot be read{where}: {one_line(error)}") from error
    if not any(example.text.strip() for example in examples):
        raise DataError(f"{args.dataset}: all references are empty; is --text-column right?")
    revision = fingerprint([path]) if path.is_file() else source.get("revision")
    about = {"model": args.model, "dataset": args.dataset, "source": source}
    return examples, {**about, "dataset_revision": revision}


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model; return 1 if some clips failed. On an error, the exit code is 2."""
    parser = parser_of("tiny-audio eval", __doc__)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--dataset", default=LOQUACIOUS, help="default: %(default)s")
    parser.add_argument("--name", help="configuration of a Hub dataset")
    parser.add_argument("--split", help="split of a Hub dataset; default: test")
    parser.add_argument("--revision", help="commit of a Hub dataset; default: the newest")
    parser.add_argument("--audio-column", metavar="NAME", help="default: audio")
    parser.add_argument("--text-column", metavar="NAME", help="default: text")
    parser.add_argument("--language", default="en", help="en, de, ...; default: %(default)s")
    parser.add_argument("--max-samples", type=int, metavar="N", help="the first N; default: all")
    parser.add_argument("--batch-seconds", type=float, default=60.0, help="padded audio in a batch")
    parser.add_argument("--out", type=home_path, help="default: outputs/eval_<model>_<dataset>...")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best one")
    parser.add_argument("--decode", choices=DECODE, help=f"tiny-audio models only: {DECODE_HELP}")
    args = parser.parse_args(argv)
    if args.max_samples is not None and args.max_samples < 1:
        parser.error(f"--max-samples {args.max_samples}: must be at least 1")
    options = {"batch_seconds": args.batch_seconds}
    options |= {"decode": args.decode} if args.decode else {}
    data = Path(args.dataset)
    what = f"{data.resolve().parent.name}_{data.stem}" if data.is_file() else data.name
    model = Path(args.model)
    name = "_".join(model.parts[-2:]) if model.name in ("model", "final") else model.name
    parts = ["eval", name, what, args.name, args.split, args.decode]
    out = args.out or Path("outputs", "_".join(filter(None, parts)))
    examples, about = read_examples(args)
    about["command"] = shlex.join(["tiny-audio", "eval", *(argv or sys.argv[1:])])
    pipe = load_recogniser(args.model, args.device, args.language)
    s = evaluate(pipe, examples, out, options, about)
    print(
        f"WER {s['wer']:.2f} % [{s['wer_low']:.2f}, {s['wer_high']:.2f}], CER {s['cer']:.2f} %, "
        f"{s['utterances']} clips, {s['words']} words; {s['substitutions']} substituted, "
        f"{s['deletions']} deleted, {s['insertions']} inserted; RTFx {s['rtfx']}; {s['errors']} "
        f"clips failed\n{out}/report.html"
    )
    return 1 if s["errors"] else 0
