"""Load a trained model for the commands, the web page, the endpoint and the evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, pipeline
from transformers.utils import logging

from .asr.asr_config import ASRConfig
from .asr.asr_pipeline import ASRPipeline
from .errors import UserError, one_line
from .progress import quiet_libraries


def check_device(device: str | None) -> None:
    """Raise UserError if this machine does not have the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {device!r} here: {one_line(error)}") from error


def load_pipeline(
    model: str,
    device: str | None = None,
    decode: str | None = None,
    terms: Sequence[str] | None = None,
    any_kind: bool = False,
) -> Any:
    """Load the ASR pipeline of a trained folder or Hub id.

    It runs on the best available device unless `device` names one. For `decode` and `terms` (words
    to prefer), see `asr_decoding.transcribe`. `any_kind` also allows other models than those of
    tiny-audio; they get neither.

    Raises:
        UserError: if `model` does not exist, is of another kind or cannot be loaded.
    """
    logging.set_verbosity_error()
    quiet_libraries()
    check_device(device)
    folder = Path(model).exists() or model.startswith((".", "/", "outputs/"))  # or a Hub id
    if folder and not (Path(model) / "config.json").is_file():
        raise UserError(
            f"{model} has no config.json, so it is not a finished model; see make quickstart"
        )
    options: Any = {"decode": decode} if decode else {}
    options |= {"decoding": {"words": list(terms)}} if terms else {}
    try:
        kind = AutoConfig.from_pretrained(model).model_type
        ours = ASRPipeline if kind == ASRConfig.model_type else None  # not the folder's copy
        if ours is None and not any_kind:
            raise UserError(f"{model} is a {kind} model, which only `tiny-audio eval` takes")
        return pipeline(
            "automatic-speech-recognition",
            model=model,
            device=device,
            pipeline_class=ours,
            trust_remote_code=ours is not None,
            **(options if ours else {}),
        )
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        where = "cannot be loaded" if folder else "is not a folder; loading it from the Hub failed"
        raise UserError(f"{model} {where}: {reason}") from error
