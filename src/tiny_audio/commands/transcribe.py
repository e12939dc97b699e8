"""`tiny-audio transcribe FILE...`: transcribe audio to text or subtitles."""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO

from tqdm import tqdm

from ..asr.asr_config import DECODE
from ..loading import load_pipeline
from . import home_path, parser_of
from .formats import FORMATS, render

DECODE_HELP = "rescore (decoder scores CTC proposals), ctc, or generate (decoder writes freely)"
TERMS_HELP = "file of names and terms to prefer, one per line"


def read_terms(path: str) -> list[str]:
    """Argparse type: read names and terms to prefer from a text file, one per line."""
    try:
        lines = home_path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    if not (terms := [line.strip() for line in lines if line.strip()]):
        raise argparse.ArgumentTypeError(f"{path} is empty: write one name or term per line")
    return terms


def spool() -> IO[bytes]:
    """Copy stdin to a seekable file, which some formats need; on disk above 16 MiB."""
    file = tempfile.SpooledTemporaryFile(2**24)  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.seek(0)
    return file


def main(argv: list[str] | None = None) -> int:
    """Write the text or subtitles of recordings.

    Unreadable files are reported, and the exit code is then 1; the other files are still
    transcribed. With --output-dir, repeating an interrupted command continues it. Without it,
    several files as json are written as JSON lines, one object per file.
    """
    parser = parser_of("tiny-audio transcribe", main.__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio or video; - is stdin")
    parser.add_argument("--model", default="outputs/quickstart", help="trained folder or Hub id")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best one")
    parser.add_argument("--decode", choices=DECODE, help=DECODE_HELP)
    parser.add_argument("--terms", type=read_terms, metavar="FILE", help=TERMS_HELP)
    parser.add_argument("--format", choices=FORMATS, default="txt", help="default: %(default)s")
    parser.add_argument("--words", action="store_true", help="timestamps of words")
    parser.add_argument("--output-dir", type=home_path, help="a file per input; skip existing ones")
    args = parser.parse_args(argv)
    folder, kind = args.output_dir, args.format
    targets = {f: folder and folder / f"{Path(f).stem}.{kind}" for f in args.files}
    if args.words and kind == "txt":
        parser.error(f"--words gives times: choose --format {', '.join(FORMATS[1:])}")
    if folder and len({*targets.values()}) < len(targets):
        parser.error("two inputs have the same output file (same name without folder and suffix)")
    if len(targets) > 1 and kind not in ("txt", "json") and not folder:
        parser.error(f"several files as {kind} need --output-dir")
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output-dir: {error}")
    todo = {name: target for name, target in targets.items() if not (target and target.exists())}
    if done := len(targets) - len(todo):
        print(f"{done} of {len(targets)} already done, skipped", file=sys.stderr)
    if not todo:
        return 0
    pipe = load_pipeline(args.model, args.device, args.decode, args.terms)
    options = {"return_timestamps": kind != "txt" and ("word" if args.words else True)}
    json_lines = len(targets) > 1 and kind == "json" and not folder
    failed = False
    sources = (spool() if name == "-" else name for name in todo)
    with tqdm(unit="s", unit_scale=True, desc="audio", disable=None) as bar:
        results = pipe.stream(sources, skip_errors=True, progress=bar.update, **options)
        for (name, target), result in zip(todo.items(), results, strict=True):
            if json_lines:
                print(json.dumps({"file": name, **result}), flush=True)
            if "error" in result:
                failed = True
                tqdm.write(f"error: {result['error']}", sys.stderr)
                continue
            for line in [*result.get("warnings", []), *result.get("missing", [])]:
                tqdm.write(f"warning: {name}: {line}", sys.stderr)
            if json_lines:
                continue
            text = render(result, kind)
            if target:
                target.with_name(target.name + ".tmp").write_text(text)
                target.with_name(target.name + ".tmp").replace(target)
            else:
                print(f"{name}: {text}" if len(targets) > 1 else text, end="", flush=True)
    return int(failed)
