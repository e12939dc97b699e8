"""`tiny-audio transcribe FILE...`: audio in, text out."""

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, pipeline
from transformers.utils import logging

from ..asr_config import ASRConfig
from ..asr_pipeline import ASRPipeline


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


def main(argv: list[str] | None = None) -> int:
    """Print each file's transcript; broken files are named, the rest goes on, and 1 is returned."""
    parser = argparse.ArgumentParser(prog="tiny-audio transcribe", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio or video, any format")
    parser.add_argument("--model", default="outputs/quickstart", help="trained folder or Hub id")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--decoder-only", action="store_true", help="leave out the CTC score")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model, args.device)
    options = {"ctc_decode_weight": 0.0} if args.decoder_only else {}
    failed = 0
    for file, result in zip(
        args.files, pipe.stream(args.files, skip_errors=True, **options), strict=True
    ):
        if "error" in result:
            failed += 1
            print(f"error: {result['error']}", file=sys.stderr)
            continue
        print(f"{file}: {result['text']}" if len(args.files) > 1 else result["text"], flush=True)
        if result.get("truncated"):
            print(f"warning: {file}: decoding stopped at its token limit", file=sys.stderr)
    return 1 if failed else 0
