"""`tiny-audio transcribe FILE...`: audio in, text or subtitles out."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm
from transformers import AutoConfig, pipeline
from transformers.utils import logging

from ..asr_config import ASRConfig
from ..asr_pipeline import ASRPipeline
from .formats import FORMATS, render


def load_pipeline(model: str, device: str | None = None) -> Any:
    """The ASR pipeline of a trained folder or Hub id, on the best device unless one is named.

    Raises:
        SystemExit: with one line, when `model` is no model of ours or does not exist.
    """
    logging.set_verbosity_error()
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        sys.exit(f"error: {model} holds no config.json: it is no finished model folder")
    try:
        kind = AutoConfig.from_pretrained(model).model_type
        ours = ASRPipeline if kind == ASRConfig.model_type else None  # not the folder's copy of it
        return pipeline(
            "automatic-speech-recognition",
            model=model,
            device=device,
            pipeline_class=ours,
            trust_remote_code=ours is not None,
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        sys.exit(f"error: {model} cannot be loaded as a model: {reason}")


def spool() -> IO[bytes]:
    """The standard input, on disk once it is large: some formats are read backwards."""
    file = tempfile.SpooledTemporaryFile(2**24)  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.seek(0)
    return file


def main(argv: list[str] | None = None) -> int:
    """Write each file's transcript; broken files are named, the rest goes on, and 1 is returned."""
    parser = argparse.ArgumentParser(prog="tiny-audio transcribe", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio or video; - is stdin")
    parser.add_argument("--model", default="outputs/quickstart", help="trained folder or Hub id")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--format", choices=FORMATS, default="txt", help="default: %(default)s")
    parser.add_argument("--words", action="store_true", help="times of words, not of subtitles")
    parser.add_argument(
        "--output-dir", type=Path, help="a file for each input; what is there is not done again"
    )
    parser.add_argument("--decoder-only", action="store_true", help="leave out the CTC score")
    args = parser.parse_args(argv)
    folder, kind = args.output_dir, args.format
    targets = {f: folder and folder / f"{Path(f).stem}.{kind}" for f in args.files}
    if folder and len({*targets.values()}) < len(targets):
        parser.error("two of the files would be written to one: their names differ in suffix only")
    if len(targets) > 1 and kind != "txt" and not folder:
        parser.error(f"several files as {kind} need --output-dir")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    todo = {name: target for name, target in targets.items() if not (target and target.exists())}
    if len(todo) < len(targets):
        print(f"{len(targets) - len(todo)} of {len(targets)} done before", file=sys.stderr)
    if not todo:
        return 0
    pipe = load_pipeline(args.model, args.device)
    options: dict[str, Any] = {"ctc_decode_weight": 0.0} if args.decoder_only else {}
    if kind != "txt":
        options["return_timestamps"] = "word" if args.words else True
    failed = 0
    sources = (spool() if name == "-" else name for name in todo)
    with tqdm(unit="s", unit_scale=True, desc="audio", disable=None) as bar:
        results = pipe.stream(sources, skip_errors=True, progress=bar.update, **options)
        for (name, target), result in zip(todo.items(), results, strict=True):
            if "error" in result:
                failed += 1
                tqdm.write(f"error: {result['error']}", sys.stderr)
                continue
            for line in [*result.get("warnings", []), *result.get("missing", [])]:
                tqdm.write(f"warning: {name}: {line}", sys.stderr)
            text = render(result, kind)
            if target:
                target.with_name(target.name + ".tmp").write_text(text)
                target.with_name(target.name + ".tmp").replace(target)
            else:
                print(f"{name}: {text}" if len(targets) > 1 else text, end="", flush=True)
    return 1 if failed else 0
