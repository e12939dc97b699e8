"""ASRPipeline: transcribe audio of any length into text and times, in batches of similar length.

The pipeline decodes with the model's own settings, so `pipeline(...)`, the command line, the web
page, the endpoint and the evaluation return the same text.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import Pipeline

from .asr_audio import SAMPLE_RATE, AudioError, AudioInput, loud_span, read_audio, split_blocks
from .asr_config import check_keys
from .asr_ctc import letter_support, time_words
from .asr_decoding import Transcript, transcribe

logger = logging.getLogger(__name__)
READ_AHEAD = 64  # pieces read before they are decoded: bounds memory
BATCH_SECONDS = 60.0
LEAST_FILLED = 0.8  # on a CPU, clips encoded together are at least this share of the longest
# Call arguments of _read, _forward and postprocess.
ARGUMENTS = (
    {"sampling_rate", "limit_seconds", "skip_errors"},
    {"batch_seconds", "progress", "decode", "decoding", "generate_kwargs"},
    {"return_timestamps"},
)
# Types that have a length and items but are a single input.
ONE_INPUT = (str, bytes, bytearray, memoryview, dict, np.ndarray, torch.Tensor)
# Threads may share a pipeline, and scoring turns the decoder's LoRA off for a moment. The lock
# belongs to the module, because a pipeline that holds a lock cannot be pickled.
DECODE_LOCK = threading.Lock()
SILENCE = 1e-5  # a piece is silent if all samples are below this (-100 dBFS)
MIN_SUPPORT = 0.65  # no_speech: the audio supports the text's letters less
LOOP_CONFIDENCE = 0.5  # repetition: a loop with less confidence
FLAGS = {
    "truncated": "reached the token limit for its length",
    "repetition": "repeats the same text over and over",
    "no_speech": "may contain no speech",
    "silent": "is silent and was not decoded",
}
# PyTorch on a GPU and on a CPU.
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory")
# Up to 8 words four times in a row, or up to 8 letters six times.
LOOP = re.compile(r"(?i)(?<!\S)(\S+(?:\s+\S+){0,7}?)(?:\s+\1(?!\S)){3,}|([^\W\d_]{1,8}?)\2{5,}")
# A subtitle ends at a pause, at the end of a sentence, or at its maximum length (seconds).
PAUSE, LONGEST_SEGMENT = 0.5, 6.0


@dataclass
class Piece:
    """A stretch of one input's audio, short enough for the model.

    Attributes:
        start: offset in the input (seconds).
        seconds: length.
        samples: mono 16 kHz, shape (n,); released once decoded.
        text: transcript, once decoded.
        words: dicts of `text`, `timestamp` (start, end) in seconds of the input and `confidence`.
            Without a CTC head, the whole text is one word.
        confidence: geometric mean of the CTC probabilities of the text's letters.
        support: how well the audio supports so many letters, see `letter_support`; 1.0 for a
            text without letters.
        flags: problems with the text, keys of `FLAGS`.
    """

    start: float
    samples: np.ndarray = field(repr=False)
    seconds: float = 0.0
    text: str = ""
    words: list[dict[str, Any]] = field(default_factory=list)
    confidence: float | None = None
    support: float = 1.0
    flags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seconds = len(self.samples) / SAMPLE_RATE


@dataclass
class Recording:
    """One input on its way through the pipeline.

    Attributes:
        source: see `read_audio`.
        pieces: pieces cut so far.
        missing: stretches that could not be decoded.
        notes: other warnings.
        error: why the input cannot be read.
    """

    source: Any
    pieces: list[Piece] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""


class ASRPipeline(Pipeline):
    """`pipeline("automatic-speech-recognition", model=..., trust_remote_code=True)`.

    Call it with a path, URL, bytes, array, dict or a list of these. It returns a dict, or a list of
    dicts, with `text` and, if they apply:
    - `chunks`: dicts of `text`, `timestamp` (start, end) in seconds and `confidence`;
    - `truncated`, `repetition`, `no_speech`, `silent`: True, see `FLAGS`; `warnings` give the
      times. A pause between speech only adds a warning;
    - `missing`: stretches of a damaged file that could not be decoded.

    Call arguments:
        return_timestamps: True adds `chunks` of subtitle length, "word" adds single words.
        batch_seconds: seconds of audio decoded together, including padding.
        sampling_rate: Hz of raw arrays.
        limit_seconds: refuse longer inputs.
        skip_errors: return `{"text": "", "error": reason}` for an input that cannot be read,
            instead of raising.
        decode: "rescore", "ctc" or "generate", see `asr_decoding.transcribe`.
        decoding: settings that override the config's `decoding`.
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
        """Write everything that `pipeline` loads: model, processor and code."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, ...]:
        check_keys(kwargs, [name for names in ARGUMENTS for name in names], "the pipeline's call")
        times = kwargs.get("return_timestamps")
        if times not in (None, False, True, "word"):
            raise ValueError("return_timestamps must be False, True or 'word'")
        if times == "word" and not (self.model.ctc or self.model.characters):
            raise ValueError("return_timestamps='word' needs a CTC head; this model has none")
        return tuple({k: kwargs[k] for k in names & kwargs.keys()} for names in ARGUMENTS)

    def settings(self, **kwargs: Any) -> tuple[dict, ...]:
        """Split call arguments into those of `_read`, `_forward` and `postprocess`."""
        own = (self._preprocess_params, self._forward_params, self._postprocess_params)
        given = self._sanitize_parameters(**kwargs)
        return tuple({**a, **b} for a, b in zip(own, given, strict=True))

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Transcribe one input to a dict; several (list, generator, column) to a list of dicts."""
        column = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
        column = column and not isinstance(inputs, ONE_INPUT)
        several = column or (isinstance(inputs, Iterator) and not hasattr(inputs, "read"))
        sources: Any = inputs if several else [inputs]
        results = list(self.stream(sources, **kwargs))
        return results if several else results[0]

    def stream(self, inputs: Iterable[AudioInput], **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Yield results in the order of `inputs`, in constant memory."""
        pre, forward, post = self.settings(**kwargs)
        read = self._read(inputs, **pre)
        while ready := list(islice(read, READ_AHEAD)):
            self._forward([piece for _, piece in ready if piece], **forward)
            yield from (self.postprocess(recording, **post) for recording, p in ready if not p)

    def _read(
        self, inputs: Iterable[Any], skip_errors: bool = False, **pre: Any
    ) -> Iterator[tuple[Recording, Piece | None]]:
        """Yield the pieces of each input, followed by None."""
        for source in inputs:
            recording = source if isinstance(source, Recording) else Recording(source)
            try:
                yield from ((recording, piece) for piece in self.preprocess(recording, **pre))
            except AudioError as error:
                if not skip_errors:
                    raise
                recording.error = str(error)
            yield recording, None

    def pieces(self, source: AudioInput | Recording, **kwargs: Any) -> Iterator[Piece]:
        """Yield the pieces of one input in order, each as soon as its batch is decoded.

        The non-empty texts, joined with spaces, are the text that a call returns.
        """
        pre, forward, _ = self.settings(**kwargs)
        cut = (piece for _, piece in self._read([source], **pre) if piece)
        while batch := list(islice(cut, max(1, int(BATCH_SECONDS / self.processor.max_seconds)))):
            yield from self._forward(batch, **forward)

    def preprocess(  # type: ignore[override]
        self, recording: Recording, sampling_rate: int = SAMPLE_RATE, limit_seconds: float = 1e9
    ) -> Iterator[Piece]:
        """Cut one input into pieces that fit the model, and also store them in `recording`.

        Raises:
            AudioError: see `read_audio`; also if the input is longer than `limit_seconds`.
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
        """Transcribe pieces, in place, in batches of `batch_seconds`, longest first.

        Raises:
            torch.OutOfMemoryError: if a piece alone does not fit into memory.
        """
        silent = [p for p in pieces if np.abs(p.samples).max(initial=0.0) < SILENCE]
        for piece in silent:
            piece.flags = ["silent"]
        progress(sum(p.seconds for p in silent))
        loud = [p for p in pieces if not p.flags]
        while loud:
            loud.sort(key=lambda piece: piece.seconds, reverse=True)
            many = max(1, int(batch_seconds / loud[0].seconds))
            batch, loud = loud[:many], loud[many:]
            try:
                self._decode(batch, **options)
            except RuntimeError as error:
                if not OUT_OF_MEMORY.search(str(error)):
                    raise
                if len(batch) == 1:
                    raise torch.OutOfMemoryError(
                        f"out of memory: a piece of {batch[0].seconds:.1f} s does not fit; lower "
                        f"max_seconds (now {self.processor.max_seconds:g}) in processor_config.json"
                    ) from error
                batch_seconds = len(batch) * batch[0].seconds / 2
                logger.warning("out of memory: batches have %.0f s from now on", batch_seconds)
                loud += batch
            else:
                progress(sum(p.seconds for p in batch))
        for piece in pieces:
            piece.samples = np.zeros(0, np.float32)
        return pieces

    def _encode(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode clips: features (n,) or (n, mels) -> frames (b, t, d) and their numbers (b,).

        A GPU takes all at once. A CPU takes as long for padding as for speech, so it gets groups of
        similar lengths.
        """
        order = sorted(range(len(features)), key=lambda row: -len(features[row]))
        least_filled = LEAST_FILLED if self.model.device.type == "cpu" else 0.0
        frames: list[torch.Tensor] = [torch.empty(0)] * len(features)
        while order:
            shortest = least_filled * len(features[order[0]])
            group = [row for row in order if len(features[row]) >= shortest]
            order = order[len(group) :]
            batch = self.processor.collate([features[row] for row in group]).to(self.model.device)
            hidden, steps = self.model.encode(batch.input_features, batch.input_features_mask)
            for row, clip, n in zip(group, hidden, steps.tolist(), strict=True):
                frames[row] = clip[:n]
        numbers = torch.tensor([len(clip) for clip in frames], device=self.model.device)
        return torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), numbers

    @torch.no_grad()
    def _decode(self, batch: list[Piece], **options: Any) -> None:
        """Fill in texts, words and flags of a batch; `options` are those of `transcribe`."""
        spans = [loud_span(piece.samples) for piece in batch]
        trimmed = [piece.samples[a:b] for piece, (a, b) in zip(batch, spans, strict=True)]
        features = [self.processor.features(samples) for samples in trimmed]
        with DECODE_LOCK:
            hidden, steps = self._encode(features)
            found = transcribe(self.model, self.processor, hidden, steps, **options)
        for piece, span, transcript, log_probs in zip(
            batch, spans, found, self._emissions(hidden, steps, found), strict=True
        ):
            piece.text = transcript.text
            self._time(piece, log_probs, *span)
            unsure = (piece.confidence or 0.0) < LOOP_CONFIDENCE
            applies = {
                "truncated": transcript.truncated,
                "repetition": unsure and LOOP.search(piece.text),
                "no_speech": piece.support < MIN_SUPPORT or not piece.text,
            }
            piece.flags = [flag for flag, holds in applies.items() if holds]

    def _emissions(
        self, hidden: torch.Tensor, steps: torch.Tensor, found: list[Transcript]
    ) -> list[np.ndarray | None]:
        """Return the log-probabilities (t, c) of each clip for aligning words.

        They come from the character head, or else from the CTC head; None if there is neither.
        """
        if self.model.characters is not None:
            return [transcript.log_probs for transcript in found]
        if self.model.ctc is None:
            return [None] * len(found)
        frames, lengths = self.model.projector(hidden, steps)
        log_probs = self.model.ctc(frames, self.model.get_input_embeddings().weight)
        return [row[:n].cpu().numpy() for row, n in zip(log_probs, lengths, strict=True)]

    def _time(self, piece: Piece, log_probs: np.ndarray | None, first: int, last: int) -> None:
        """Fill in `words`, `confidence` and `support` of a piece by forced alignment.

        The log-probabilities (t, c) are those of its samples from `first` to `last`.
        """
        if log_probs is None:
            whole = (piece.start, piece.start + piece.seconds)
            piece.words = [{"text": piece.text, "timestamp": whole, "confidence": None}]
            piece.words = piece.words if piece.text else []
            return
        words, step, space = piece.text.split(), self.processor.frame_seconds, 0
        if self.model.characters is not None:
            space = self.processor.space
            between = [space] if space else []
            classes = [between * (i > 0) + self.processor.spell(w) for i, w in enumerate(words)]
        else:
            step *= self.processor.stack
            classes = [self.model.ctc.classes(self.processor.tokenize(word)) for word in words]
        seconds = (last - first) / SAMPLE_RATE
        edges, sure, piece.confidence = time_words(log_probs, classes, space, step, seconds)
        letters = sum(c != space for word in classes for c in word)
        piece.support = letter_support(log_probs, letters, space) if letters else 1.0
        spans = (piece.start + first / SAMPLE_RATE + edges).round(3).tolist()
        piece.words = [
            {"text": word, "timestamp": tuple(span), "confidence": c}
            for word, span, c in zip(words, spans, sure, strict=True)
        ]

    def postprocess(  # type: ignore[override]
        self, recording: Recording, return_timestamps: bool | str = False
    ) -> dict[str, Any]:
        """Join the pieces of one input into a result."""
        if recording.error:
            return {"text": "", "error": recording.error}
        pieces = recording.pieces
        result: dict[str, Any] = {"text": " ".join(p.text for p in pieces if p.text)}
        if return_timestamps:
            result["duration"] = round(pieces[-1].start + pieces[-1].seconds, 3)
            result["chunks"] = chunks(pieces, return_timestamps == "word")
        if recording.notes:
            result["warnings"] = list(recording.notes)
        for piece in pieces:
            pause = bool(result["text"]) and not piece.text  # no text, but speech elsewhere
            for flag in piece.flags:
                where = f"{piece.start:.1f}-{piece.start + piece.seconds:.1f} s"
                result.setdefault("warnings", []).append(f"{where}: {FLAGS[flag]}")
                if not pause:
                    result[flag] = True
        if recording.missing:
            result["missing"] = recording.missing
        return result


def chunks(pieces: list[Piece], by_word: bool = False) -> list[dict[str, Any]]:
    """Return the words of decoded pieces with times; unless `by_word`, grouped into subtitles."""
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
