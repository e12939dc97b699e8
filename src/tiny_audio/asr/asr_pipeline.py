"""ASRPipeline: audio of any length in, text and times out, decoded in batches by length.

The pipeline decodes with the model's own generation settings, so that `pipeline(...)`, the
command line, the page, the endpoint and the evaluation give the same text.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from transformers import Pipeline

from .asr_config import check_keys
from .asr_ctc import time_words
from .asr_decoding import Transcript, transcribe
from .asr_processing import SAMPLE_RATE, AudioError, AudioInput, read_audio

logger = logging.getLogger(__name__)
HOP = SAMPLE_RATE // 100  # 10 ms: the grid on which pauses are looked for
PAUSE_WINDOW = 20  # grid steps (0.2 s) that a cut should find quiet
ROUND = 64  # pieces that are read before they are decoded: bounds memory
BATCH_SECONDS = 60.0
# Call arguments, by the step of the pipeline that they go to.
ARGUMENTS = (
    {"sampling_rate", "limit_seconds", "skip_errors"},
    {"batch_seconds", "progress", "decode", "decoding", "generate_kwargs"},
    {"return_timestamps"},
)
# What has a length and items, and is one input all the same.
ONE_INPUT = (str, bytes, bytearray, memoryview, dict, np.ndarray, torch.Tensor)
# Threads may share a pipeline: scoring turns the decoder's LoRA off for a moment. It is the
# module's, for a pipeline with a lock in it could not be pickled.
ONE_AT_A_TIME = threading.Lock()
LEAST_PIECE = 1.0  # seconds; what is shorter than two of them is not split
SILENCE = 1e-5  # a piece whose samples are all below this (-100 dBFS) holds no speech
# A transcript of less CTC confidence is not what was said; a loop needs more of it.
UNSUPPORTED, PLAUSIBLE = 0.22, 0.5
FLAGS = {
    "truncated": "stopped at the limit of tokens for its length",
    "repetition": "says one thing over and over",
    "no_speech": "may hold no speech",
    "silent": "holds no sound, and was not decoded",
}
LOOP = re.compile(r"(?i)(?<!\S)(\S+(?:\s+\S+){0,7}?)(?:\s+\1(?!\S)){3,}|([^\W\d_]{1,8}?)\2{5,}")
# A subtitle ends at a pause, at the end of a sentence, or before it is longer than this, seconds.
PAUSE, LONGEST_SEGMENT = 0.5, 6.0


@dataclass
class Piece:
    """A stretch of one input's audio, short enough for the model.

    Attributes:
        start: offset in the input, seconds.
        seconds: length.
        samples: mono 16 kHz, shape (n,); given up once they are decoded.
        text: transcript, once decoded.
        words: dicts of `text`, `timestamp` (start, end) in seconds of the input and `confidence`;
            the whole text as one, where the model has no CTC head.
        confidence: geometric mean of the CTC probabilities of what the text is spelled with.
        flags: what is wrong with it, keys of `FLAGS`.
        parts: the pieces that it was split into, for want of memory.
    """

    start: float
    samples: np.ndarray = field(repr=False)
    seconds: float = 0.0
    text: str = ""
    words: list[dict[str, Any]] = field(default_factory=list)
    confidence: float | None = None
    flags: list[str] = field(default_factory=list)
    parts: list["Piece"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seconds = len(self.samples) / SAMPLE_RATE

    def halve(self) -> list["Piece"]:
        """Split it near its middle, in the quietest place, unless it is short already."""
        if self.seconds >= 2 * LEAST_PIECE:
            cuts = split_blocks([self.samples], 0.7 * self.seconds)
            self.parts = [Piece(self.start + at / SAMPLE_RATE, part) for at, part in cuts]
        return self.parts

    def final(self) -> list["Piece"]:
        """The pieces that make up its text: itself, unless it was split."""
        return [leaf for part in self.parts for leaf in part.final()] or [self]


@dataclass
class Recording:
    """One input on its way through the pipeline.

    Attributes:
        source: see `read_audio`.
        pieces: what it was cut into so far.
        missing: what could not be decoded.
        notes: what else should be known of it.
        error: why it cannot be read at all.
    """

    source: Any
    pieces: list[Piece] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""


def split_blocks(
    blocks: Iterable[np.ndarray], max_seconds: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Cut a recording that comes in blocks into pieces of at most `max_seconds`: (start, samples)
    of each, without gap or overlap.

    Within the last half of each allowed stretch the cut goes where a 0.2 s window has the least
    energy, so a pause is found wherever there is one.
    """
    limit, margin = int(max_seconds * SAMPLE_RATE), PAUSE_WINDOW * HOP
    held: list[np.ndarray] = []
    size = at = 0
    for block in chain(blocks, [None]):
        if block is not None:
            held.append(block)
            size += len(block)
        while size > limit + (margin if block is not None else 0):
            samples = np.concatenate(held)
            cut = _quietest(samples[: limit + margin], limit)
            yield at, samples[:cut]
            held, at, size = [samples[cut:]], at + cut, size - cut
    if size:
        yield at, np.concatenate(held)


def _quietest(samples: np.ndarray, limit: int) -> int:
    """Where to cut within the last half of the first `limit` samples."""
    steps = len(samples) // HOP
    energy = np.square(samples[: steps * HOP]).reshape(steps, HOP).mean(1)
    energy = np.pad(energy, (PAUSE_WINDOW // 2, PAUSE_WINDOW // 2 - 1), mode="edge")
    smooth = np.convolve(energy, np.ones(PAUSE_WINDOW) / PAUSE_WINDOW, mode="valid")
    low, high = limit // 2 // HOP, limit // HOP
    return (low + int(smooth[low:high].argmin())) * HOP


class ASRPipeline(Pipeline):
    """`pipeline("automatic-speech-recognition", model=..., trust_remote_code=True)`.

    Call it with a path, URL, bytes, array, dict or a list of them; it returns a dict, or a list of
    dicts, with `text`, and where there is something to say
    - `chunks`: dicts of `text`, `timestamp` (start, end) in seconds and `confidence`;
    - `truncated`, `repetition`, `no_speech`, `silent`: True, see `FLAGS`, with `warnings`, which
      say where; a pause within speech has its warning alone;
    - `missing`: what could not be decoded of a damaged file.

    Call arguments:
        return_timestamps: True adds `chunks` of a subtitle's length, "word" of single words.
        batch_seconds: padded seconds of audio decoded together.
        sampling_rate: Hz, of raw arrays.
        limit_seconds: longer inputs are refused.
        skip_errors: an input that cannot be read gives `{"text": "", "error": reason}` instead of
            ending the call.
        decode: "rescore", "ctc" or "generate", see `asr_decoding.transcribe`.
        decoding: settings that override the config's `decoding`, by name.
        progress: called with the seconds of audio of each batch.
        generate_kwargs: arguments of `generate`, for decode="generate".
    """

    model: Any
    processor: Any
    _load_processor = True
    _load_tokenizer = _load_feature_extractor = _load_image_processor = False
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.eval()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write model, processor and code: all that `pipeline` loads."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, ...]:
        check_keys(kwargs, [name for names in ARGUMENTS for name in names], "the pipeline's call")
        times = kwargs.get("return_timestamps")
        if times not in (None, False, True, "word"):
            raise ValueError("return_timestamps is False, True or 'word'")
        if times == "word" and self.model.ctc is None:
            raise ValueError("word times need a CTC head, which this model lacks; use True")
        return tuple({k: kwargs[k] for k in names & kwargs.keys()} for names in ARGUMENTS)

    def settings(self, **kwargs: Any) -> tuple[dict, ...]:
        """Arguments of `preprocess`, `_forward` and `postprocess` for these call arguments."""
        own = (self._preprocess_params, self._forward_params, self._postprocess_params)
        given = self._sanitize_parameters(**kwargs)
        return tuple({**a, **b} for a, b in zip(own, given, strict=True))

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Transcribe one input (a dict comes back), or a list, generator or column (a list)."""
        column = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
        column = column and not isinstance(inputs, ONE_INPUT)
        several = column or (isinstance(inputs, Iterator) and not hasattr(inputs, "read"))
        sources: Any = inputs if several else [inputs]
        results = list(self.stream(sources, **kwargs))
        return results if several else results[0]

    def stream(self, inputs: Iterable[AudioInput], **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Results in the order of `inputs`, decoded some minutes at a time (constant memory)."""
        pre, forward, post = self.settings(**kwargs)
        read = self._read(inputs, **pre)
        while some := list(islice(read, ROUND)):
            self._forward([piece for _, piece in some if piece], **forward)
            yield from (self.postprocess(recording, **post) for recording, p in some if not p)

    def _read(
        self, inputs: Iterable[AudioInput], skip_errors: bool = False, **pre: Any
    ) -> Iterator[tuple[Recording, Piece | None]]:
        """The pieces of each input, and None behind its last."""
        for source in inputs:
            recording = Recording(source)
            try:
                yield from ((recording, piece) for piece in self.preprocess(recording, **pre))
            except AudioError as error:
                if not skip_errors:
                    raise
                recording.error = str(error)
            yield recording, None

    def pieces(self, source: AudioInput | Recording, **kwargs: Any) -> Iterator[Piece]:
        """The pieces of one input in order, each as soon as its batch is decoded.

        Joined with spaces, their texts are the text that a call gives.
        """
        pre, forward, _ = self.settings(**kwargs)
        recording = source if isinstance(source, Recording) else Recording(source)
        cut = self.preprocess(recording, **pre)
        while some := list(islice(cut, max(1, int(BATCH_SECONDS / self.processor.max_seconds)))):
            yield from self._forward(some, **forward)

    def preprocess(  # type: ignore[override]
        self, recording: Recording, sampling_rate: int = SAMPLE_RATE, limit_seconds: float = 1e9
    ) -> Iterator[Piece]:
        """One input -> pieces that the model can take, which are also kept in `recording`.

        Raises:
            AudioError: see `read_audio`; or for more than `limit_seconds`.
        """
        blocks = read_audio(recording.source, sampling_rate, recording.missing, recording.notes)
        for at, samples in split_blocks(blocks, self.processor.max_seconds):
            if (at + len(samples)) / SAMPLE_RATE > limit_seconds:
                raise AudioError(f"longer than the limit of {limit_seconds:.0f} s")
            recording.pieces.append(piece := Piece(at / SAMPLE_RATE, samples))
            yield piece

    def _forward(  # type: ignore[override]
        self,
        pieces: list[Piece],
        batch_seconds: float = BATCH_SECONDS,
        progress: Callable[[float], Any] = lambda seconds: None,
        **options: Any,
    ) -> list[Piece]:
        """Fill in the text of each piece, longest first, in batches of `batch_seconds`.

        Returns:
            The final pieces in the order of `pieces`.
        """
        loud: list[Piece] = []
        for piece in pieces:
            if np.abs(piece.samples).max(initial=0.0) >= SILENCE:
                loud.append(piece)
            else:
                piece.flags = ["silent"]
        progress(sum(p.seconds for p in pieces) - sum(p.seconds for p in loud))
        again: list[Piece] = []
        for batch in length_batches(loud, batch_seconds):
            try:
                self._decode(batch, **options)
            except RuntimeError as error:
                if "memory" not in str(error):
                    raise
                logger.warning("out of memory: pieces of %.0f s are halved", batch[0].seconds)
                again += [half for p in batch for half in p.halve() or [p]]
                batch_seconds /= 2
            progress(sum(p.seconds for p in batch))
        for batch in length_batches(again, batch_seconds):
            self._decode(batch, **options)
        final = [leaf for piece in pieces for leaf in piece.final()]
        for piece in [*pieces, *final]:
            piece.samples = np.zeros(0, np.float32)
        return final

    @torch.no_grad()
    def _decode(
        self,
        batch: list[Piece],
        decode: str | None = None,
        decoding: dict[str, Any] | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Fill in texts, words and flags of a batch; the encoder runs once for all of it."""
        features = [self.processor.features(piece.samples) for piece in batch]
        inputs = self.processor.collate(features).to(self.model.device)
        options = {"decode": decode, "decoding": decoding, "generate_kwargs": generate_kwargs}
        with ONE_AT_A_TIME:
            hidden, steps = self.model.encode(inputs.input_features, inputs.input_features_mask)
            found = transcribe(self.model, self.processor, hidden, steps, **options)
        for piece, transcript, log_probs in zip(
            batch, found, self._emissions(hidden, steps, found), strict=True
        ):
            piece.text = transcript.text
            self._time(piece, log_probs)
            piece.flags = ["truncated"] if transcript.truncated else []
            sure = piece.confidence or 0.0
            piece.flags += ["repetition"] if sure < PLAUSIBLE and LOOP.search(piece.text) else []
            unsupported = piece.confidence is not None and sure < UNSUPPORTED
            piece.flags += ["no_speech"] if unsupported or not piece.text else []

    def _emissions(
        self, hidden: torch.Tensor, steps: torch.Tensor, found: list[Transcript]
    ) -> list[np.ndarray | None]:
        """What words are aligned with: log-probabilities (t, c) of each clip by the character head
        or else by the one over tokens; None without a head."""
        if self.model.characters is not None:
            return [transcript.log_probs for transcript in found]
        if self.model.ctc is None:
            return [None] * len(found)
        frames, lengths = self.model.projector(hidden, steps)
        log_probs = self.model.ctc(frames, self.model.get_input_embeddings().weight)
        return [row[:n].cpu().numpy() for row, n in zip(log_probs, lengths, strict=True)]

    def _time(self, piece: Piece, log_probs: np.ndarray | None) -> None:
        """Fill in `words` and `confidence` of a piece by forced alignment."""
        if log_probs is None:
            whole = (piece.start, piece.start + piece.seconds)
            piece.words = [{"text": piece.text, "timestamp": whole, "confidence": None}]
            piece.words = piece.words if piece.text else []
            return
        words, step, space = piece.text.split(), self.processor.frame_seconds, 0
        if self.model.characters is not None:
            space = self.processor.space
            between = [space] if space else []
            spelled = [between * (i > 0) + self.processor.spell(w) for i, w in enumerate(words)]
        else:
            step *= self.processor.stack
            spelled = [self.model.ctc.spelled(self.processor.tokenize(word)) for word in words]
        edges, sure, piece.confidence = time_words(log_probs, spelled, space, step, piece.seconds)
        spans = (piece.start + edges).round(3).tolist()
        piece.words = [
            {"text": word, "timestamp": tuple(span), "confidence": c}
            for word, span, c in zip(words, spans, sure, strict=True)
        ]

    def postprocess(  # type: ignore[override]
        self, recording: Recording, return_timestamps: bool | str = False
    ) -> dict[str, Any]:
        """Join the pieces of one input."""
        if recording.error:
            return {"text": "", "error": recording.error}
        pieces = [leaf for piece in recording.pieces for leaf in piece.final()]
        result: dict[str, Any] = {"text": " ".join(p.text for p in pieces if p.text)}
        if return_timestamps:
            result["duration"] = round(pieces[-1].start + pieces[-1].seconds, 3)
            result["chunks"] = chunks(pieces, return_timestamps == "word")
        if recording.notes:
            result["warnings"] = list(recording.notes)
        for piece in pieces:
            pause = bool(result["text"]) and not piece.text  # of a recording that holds speech
            for flag in piece.flags:
                where = f"{piece.start:.1f}-{piece.start + piece.seconds:.1f} s"
                result.setdefault("warnings", []).append(f"{where}: {FLAGS[flag]}")
                if not pause:
                    result[flag] = True
        if recording.missing:
            result["missing"] = recording.missing
        return result


def chunks(pieces: list[Piece], by_word: bool = False) -> list[dict[str, Any]]:
    """Words of decoded pieces with their times, or words grouped to the length of a subtitle."""
    words = [word for piece in pieces for word in piece.words]
    if by_word:
        return words
    segments: list[dict[str, Any]] = []
    for word in words:
        start, end = word["timestamp"]
        last = segments[-1] if segments else None
        if (
            last is None
            or start - last["timestamp"][1] > PAUSE
            or last["text"].endswith((".", "?", "!"))
            or end - last["timestamp"][0] > LONGEST_SEGMENT
        ):
            segments.append({**word})
        else:
            last["text"] += " " + word["text"]
            last["timestamp"] = last["timestamp"][0], end
            sure = [c for c in (last["confidence"], word["confidence"]) if c is not None]
            last["confidence"] = min(sure, default=None)
    return segments


def length_batches(pieces: list[Piece], batch_seconds: float) -> Iterator[list[Piece]]:
    """Pieces sorted longest first, cut where padding to the longest exceeds `batch_seconds`."""
    left = sorted(pieces, key=lambda piece: piece.seconds, reverse=True)
    while left:
        many = max(1, int(batch_seconds / left[0].seconds))
        yield left[:many]
        left = left[many:]
