"""ASRPipeline: audio of any length in, text out, decoded in batches by length.

The pipeline decodes with the model's own generation settings, so that `pipeline(...)`, the
command line and the evaluation give the same text.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import Pipeline

from .asr_processing import SAMPLE_RATE, AudioError, AudioInput, load_audio

logger = logging.getLogger(__name__)
HOP = SAMPLE_RATE // 100  # 10 ms: the grid on which pauses are looked for
PAUSE_WINDOW = 20  # grid steps (0.2 s) that a cut should find quiet
# How many input files are read before a round of batches is decoded: bounds memory.
FILES_PER_ROUND = 64


@dataclass
class Piece:
    """A stretch of one input's audio, short enough for the model.

    Attributes:
        item: index of the input that it is cut from.
        start: offset in the input, seconds.
        samples: mono 16 kHz, shape (n,).
        text: transcript, once decoded.
        truncated: decoding stopped at the token limit instead of an end token.
    """

    item: int
    start: float
    samples: np.ndarray = field(repr=False)
    text: str = ""
    truncated: bool = False


def split_at_pauses(samples: np.ndarray, max_seconds: float) -> list[tuple[int, int]]:
    """Cut points of a recording into pieces of at most `max_seconds`, in the quietest places.

    Within the last half of each allowed stretch the cut goes where a 0.2 s window has the least
    energy, so a pause is found wherever there is one.

    Returns:
        (start, end) in samples for each piece; they cover the recording without gap or overlap.
    """
    limit = int(max_seconds * SAMPLE_RATE)
    if len(samples) <= limit:
        return [(0, len(samples))]
    steps = len(samples) // HOP
    energy = np.square(samples[: steps * HOP]).reshape(steps, HOP).mean(1)
    smooth = np.convolve(energy, np.ones(PAUSE_WINDOW) / PAUSE_WINDOW, mode="same")
    bounds, start = [], 0
    while len(samples) - start > limit:
        low, high = (start + limit // 2) // HOP, (start + limit) // HOP
        cut = (low + int(smooth[low:high].argmin())) * HOP
        bounds.append((start, cut))
        start = cut
    return [*bounds, (start, len(samples))]


class ASRPipeline(Pipeline):
    """`pipeline("automatic-speech-recognition", model=..., trust_remote_code=True)`.

    Call it with a path, URL, bytes, array, dict or a list of them; it returns a dict with `text`
    (and `truncated: True` where the model ran into its token limit), or a list of dicts.

    Call arguments:
        batch_seconds: padded seconds of audio decoded together.
        sampling_rate: Hz, of raw arrays.
        skip_errors: an input that cannot be read gives `{"text": "", "error": reason}` instead of
            ending the call.
        ctc_decode_weight: overrides the model's own; 0 is the decoder alone.
        ctc_only: the greedy transcript of the CTC head instead.
        generate_kwargs: further arguments of `generate`.
    """

    model: Any
    processor: Any
    _load_processor = True
    _load_tokenizer = _load_feature_extractor = _load_image_processor = False
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.eval()

    def _sanitize_parameters(
        self,
        batch_seconds: float | None = None,
        sampling_rate: int | None = None,
        skip_errors: bool | None = None,
        ctc_decode_weight: float | None = None,
        ctc_only: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> tuple[dict, dict, dict]:
        forward: dict[str, Any] = {
            "batch_seconds": batch_seconds,
            "ctc_decode_weight": ctc_decode_weight,
            "ctc_only": ctc_only,
            "generate_kwargs": generate_kwargs,
        }
        pre = {"sampling_rate": sampling_rate, "skip_errors": skip_errors}
        kept = [{k: v for k, v in part.items() if v is not None} for part in (pre, forward)]
        return kept[0], kept[1], {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Transcribe one input (a dict comes back) or a list, tuple or generator (a list)."""
        several = isinstance(inputs, list | tuple | Iterator)
        results = list(self.stream(inputs if several else [inputs], **kwargs))
        return results if several else results[0]

    def stream(self, inputs: Iterable[AudioInput], **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Results in the order of `inputs`, a round of files at a time (constant memory)."""
        pre, forward, _ = self._sanitize_parameters(**kwargs)
        pre, forward = {**self._preprocess_params, **pre}, {**self._forward_params, **forward}
        batch: list[AudioInput] = []
        for item in inputs:
            batch.append(item)
            if len(batch) == FILES_PER_ROUND:
                yield from self._round(batch, pre, forward)
                batch = []
        yield from self._round(batch, pre, forward)

    def _round(self, inputs: list[AudioInput], pre: dict, forward: dict) -> Iterator[dict]:
        pre = dict(pre)  # shared by all rounds
        skip_errors = pre.pop("skip_errors", False)
        pieces: list[Piece] = []
        errors: dict[int, str] = {}
        for i, source in enumerate(inputs):
            try:
                pieces += self.preprocess(source, item=i, **pre)
            except AudioError as error:
                if not skip_errors:
                    raise
                errors[i] = str(error)
        self._forward(pieces, **forward)
        for i in range(len(inputs)):
            result = self.postprocess([piece for piece in pieces if piece.item == i])
            yield {**result, "error": errors[i]} if i in errors else result

    def preprocess(  # type: ignore[override]
        self, inputs: AudioInput, item: int = 0, sampling_rate: int = SAMPLE_RATE
    ) -> list[Piece]:
        """One input -> pieces that the model can take."""
        samples = load_audio(inputs, sampling_rate)
        return [
            Piece(item, start / SAMPLE_RATE, samples[start:end])
            for start, end in split_at_pauses(samples, self.processor.max_seconds)
        ]

    def _forward(  # type: ignore[override]
        self,
        pieces: list[Piece],
        batch_seconds: float = 60.0,
        ctc_decode_weight: float | None = None,
        ctc_only: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> list[Piece]:
        """Fill in the text of each piece, longest first, in batches of `batch_seconds`."""
        for batch in length_batches(pieces, batch_seconds):
            features = [self.processor.features(piece.samples) for piece in batch]
            inputs = self.processor.collate(features).to(self.model.device)
            audio = {k: inputs[k] for k in ("input_features", "input_features_mask")}
            if ctc_only:
                ids = self.model.ctc_generate(**audio)
            else:
                ids = self.model.generate(
                    **inputs, ctc_decode_weight=ctc_decode_weight, **(generate_kwargs or {})
                ).tolist()
            for piece, feature, row in zip(batch, features, ids, strict=True):
                piece.text = self.processor.decode(row)
                spoken = [t for t in row if t != self.processor.end_token_id]
                limit = self.model.token_limits(torch.tensor(self.processor.frames(len(feature))))
                piece.truncated = len(spoken) >= int(limit)
                if piece.truncated:
                    logger.warning(
                        "at %.1f s: stopped at the limit of %d tokens for %.1f s of audio",
                        piece.start, int(limit), len(piece.samples) / SAMPLE_RATE,
                    )  # fmt: skip
        return pieces

    def postprocess(self, pieces: list[Piece]) -> dict[str, Any]:  # type: ignore[override]
        """Join the pieces of one input."""
        result: dict[str, Any] = {"text": " ".join(p.text for p in pieces if p.text)}
        if any(piece.truncated for piece in pieces):
            result["truncated"] = True
        return result


def length_batches(pieces: list[Piece], batch_seconds: float) -> Iterator[list[Piece]]:
    """Pieces sorted longest first, cut where padding to the longest exceeds `batch_seconds`."""
    ordered = sorted(pieces, key=lambda piece: len(piece.samples), reverse=True)
    batch: list[Piece] = []
    for piece in ordered:
        if batch and len(batch[0].samples) * (len(batch) + 1) > batch_seconds * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
