"""Load a trained model for use: the one way of commands, page, endpoint and evaluation."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, pipeline
from transformers.utils import logging

from .asr.asr_config import ASRConfig
from .asr.asr_pipeline import ASRPipeline
from .hub import one_line
from .progress import quiet_libraries


def check_device(device: str | None) -> None:
    """Raises SystemExit, with one line, for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"error: no device {device!r} here: {one_line(error)}")


def load_pipeline(
    model: str,
    device: str | None = None,
    decode: str | None = None,
    terms: Sequence[str] | None = None,
) -> Any:
    """The ASR pipeline of a trained folder or Hub id, on the best device unless one is named.

    `decode` and `terms`, which the lexicon prefers, are for models of ours: see
    `asr_decoding.transcribe`.

    Raises:
        SystemExit: with one line, when `model` is no model of ours or does not exist.
    """
    logging.set_verbosity_error()
    quiet_libraries()
    check_device(device)
    folder = Path(model).exists() or model.startswith((".", "/", "outputs/"))  # or a Hub id
    if folder and not (Path(model) / "config.json").is_file():
        sys.exit(
            f"error: {model} has no config.json: no finished model (make quickstart trains one)"
        )
    chosen: Any = {"decode": decode} if decode else {}
    chosen |= {"decoding": {"words": list(terms)}} if terms else {}
    try:
        kind = AutoConfig.from_pretrained(model).model_type
        ours = ASRPipeline if kind == ASRConfig.model_type else None  # not the folder's copy of it
        return pipeline(
            "automatic-speech-recognition",
            model=model,
            device=device,
            pipeline_class=ours,
            trust_remote_code=ours is not None,
            **(chosen if ours else {}),
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        where = "cannot be loaded" if folder else "is no folder here, and not loaded from the Hub"
        sys.exit(f"error: {model} {where}: {reason}")
