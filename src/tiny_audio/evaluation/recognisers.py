"""One interface to the speech recognisers that can be evaluated: clips in, texts out."""

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file

from ..asr.asr_audio import SAMPLE_RATE
from ..asr.asr_config import ASRConfig
from ..asr.asr_pipeline import ASRPipeline
from ..errors import UserError, one_line
from ..loading import check_device, load_pipeline

# Config classes that transformers' speech recognition pipeline accepts, and ours.
RECOGNISERS: list[Any] = [modeling_auto.MODEL_FOR_CTC_MAPPING, modeling_auto.MODEL_FOR_TDT_MAPPING]
RECOGNISERS += [modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, {ASRConfig}]


class FasterWhisper:
    """A CTranslate2 Whisper folder, without temperature fallback, so results are reproducible."""

    def __init__(self, name: str, device: str | None, language: str) -> None:
        from faster_whisper import WhisperModel

        self.whisper, self.language = WhisperModel(name, device=device or "auto"), language
        self.device, self.dtype = self.whisper.model.device, self.whisper.model.compute_type

    def __call__(self, clips: Sequence[np.ndarray]) -> list[str]:
        """The text of each clip (n,) at 16 kHz; clips are decoded one by one."""
        options: dict[str, Any] = {"language": self.language, "temperature": 0.0}
        answers = [self.whisper.transcribe(clip, **options)[0] for clip in clips]
        return ["".join(segment.text for segment in segments) for segments in answers]


def load_recogniser(name: str, device: str | None = None, language: str = "en") -> Any:
    """Load a model from a folder or the Hub, by default on the best device.

    Returns:
        A recogniser for `recognise`, with `device`, `dtype`, `language` and `revision` (the commit
        on the Hub, or the SHA-256 of a folder's weights).

    Raises:
        UserError: if the model does not exist or is not a speech recogniser.
    """
    check_device(device)
    pipe: Any
    config: Any = None
    with contextlib.suppress(OSError, ValueError):  # `load_pipeline` reports it
        config = AutoConfig.from_pretrained(name)
    if (Path(name) / "model.bin").is_file():
        if find_spec("faster_whisper") is None:
            raise UserError(f"{name}: CTranslate2 needs pip install 'tiny-audio[faster-whisper]'")
        pipe = FasterWhisper(name, device, language)
    elif hasattr(PROCESSOR_MAPPING.get(type(config), None), "apply_transcription_request"):
        raise UserError(f"{name} is a speech LLM, which needs a prompt of its own: not supported")
    elif config is not None and not any(type(config) in kind for kind in RECOGNISERS):
        raise UserError(f"{name} is not a speech recogniser: it is of type {config.model_type}")
    else:
        pipe = load_pipeline(name, device, any_kind=True)
        if pipe.tokenizer.pad_token is None:  # transformers needs one to batch
            pipe.tokenizer.pad_token = pipe.tokenizer.eos_token
        generation: Any = pipe.model.generation_config if pipe.model.can_generate() else config
        if generation.to_dict().get("is_multilingual"):  # keep Whisper from guessing the language
            pipe._forward_params |= {"language": language, "task": "transcribe"}
    snapshot = Path(str(cached_file(name, "config.json"))).parent.name  # commit in the Hub cache
    pipe.revision = fingerprint(files) if (files := model_files(name)) else snapshot
    pipe.language = language
    return pipe


def model_files(folder: str | Path) -> list[Path]:
    """Files of a model folder that its texts may depend on, and a few more; none for a Hub id."""
    kinds = {".safetensors", ".bin", ".json", ".gz", ".txt", ".model", ".jinja"}
    reports = {"summary.json", "finished.json", "tuning.json"}
    return sorted(f for f in Path(folder).glob("*") if f.suffix in kinds and f.name not in reports)


def fingerprint(paths: Sequence[Path]) -> str:
    """A shortened SHA-256 of files, to identify them as a commit does on the Hub."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def recognise(pipe: Any, clips: Sequence[np.ndarray], options: dict[str, Any]) -> list[dict]:
    """Transcribe clips (n,) at 16 kHz; return a dict with `text`, and `error` on failure, for each.

    A batch that fails is repeated clip by clip. `options` apply to our own pipeline.
    """
    try:
        if isinstance(pipe, ASRPipeline):
            return list(pipe.stream(clips, **options))
        if isinstance(pipe, FasterWhisper):
            return [{"text": text.strip()} for text in pipe(clips)]
        size, long = len(clips), False
        if pipe.type == "seq2seq_whisper":  # it pads every clip to 30 s
            size = max(1, int(options.get("batch_seconds", 60.0) / 30))
            long = max(map(len, clips)) > 30 * SAMPLE_RATE
        if pipe.type == "ctc" or long:  # a batch's padding would be decoded as speech
            size = 1
        raw = [{"raw": clip, "sampling_rate": SAMPLE_RATE} for clip in clips]
        answers = pipe(raw, batch_size=size, **({"return_timestamps": True} if long else {}))
        return [{"text": answer["text"].strip()} for answer in answers]
    except Exception as error:  # other people's models may raise anything; report it per clip
        if len(clips) == 1:
            return [{"text": "", "error": f"{type(error).__name__}: {one_line(error)}"}]
        print(f"a batch failed ({one_line(error)}); repeating it clip by clip", file=sys.stderr)
        return [recognise(pipe, [clip], options)[0] for clip in clips]
