"""Samples -> features; text -> prompt, placeholder tokens, labels."""

import math
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unicodedata import category

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .asr_audio import SAMPLE_RATE, AudioInput, load_audio
from .asr_config import IGNORE
from .asr_encoder import family_of

LOUD, LOUD_PERCENTILE = 0.1, 95  # target RMS (-20 dBFS) of the loudest twentieth of a clip
CLICK_FRAMES = 3  # the loudest 75 ms may be a click
MAX_GAIN = 1e4  # 80 dB: digital silence stays silent
INNER_APOSTROPHE = r"(?<=\w)’(?=\w)"  # at the end of a word, it may close a quotation


def normalise_level(samples: np.ndarray) -> np.ndarray:
    """Scale samples (n,) until their loud parts have an RMS of `LOUD`, whatever the gain was.

    If speech fills less than a twentieth of the clip, the 95th percentile is the level of the
    pause; half of the peak is then the lower bound.
    """
    size = SAMPLE_RATE // 40  # 25 ms
    frames = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    levels = np.sort(np.sqrt(np.square(frames).mean(1)))
    peak = levels[-1 - CLICK_FRAMES :][0]
    loud = max(np.percentile(levels, LOUD_PERCENTILE), peak / 2)
    return (samples * min(LOUD / max(loud, 1e-9), MAX_GAIN)).astype(np.float32)


def without_marks(text: str) -> str:
    """Lower-case a text; remove all punctuation and symbols except the apostrophe."""
    letters = re.sub(INNER_APOSTROPHE, "'", text.lower())
    return "".join(c for c in letters if c == "'" or category(c)[0] not in "PS")


class ASRProcessor(ProcessorMixin):
    """Turn audio (and, for training, text) into inputs of `ASRModel`, and token ids into text.

    The prompt is a fixed string in the decoder's chat format: `prompt_prefix`, one placeholder per
    projected frame, `prompt_suffix`. SmolLM3's own chat template is not used, because it adds
    today's date.

    Args:
        feature_extractor: feature extractor of the encoder.
        tokenizer: tokenizer of the decoder.
        encoder: `model_type`, and the settings that determine the number of frames, see
            `EncoderFamily.geometry`.
        stack: number of encoder frames in a projected frame.
        prompt_prefix, prompt_suffix: text around the audio.
        audio_token: the placeholder, which is added to the tokenizer.
        end_token: token that ends every transcript.
        min_seconds: shorter clips are padded with silence to this length.
        tail_seconds: silence appended to every clip, which steadies the last frames.
        max_seconds: longest piece that the model receives; the pipeline splits longer audio.
        alphabet: byte of each class of the character head from 1 on; empty without a character
            head.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        encoder: dict[str, Any] | None = None,
        stack: int = 5,
        prompt_prefix: str = "<|im_start|>user\nTranscribe: ",
        prompt_suffix: str = "<|im_end|>\n<|im_start|>assistant\n",
        audio_token: str = "<audio>",
        end_token: str = "<|im_end|>",
        min_seconds: float = 0.1,
        tail_seconds: float = 0.0,
        max_seconds: float = 30.0,
        alphabet: Sequence[int] = (),
    ) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]})
        super().__init__(feature_extractor, tokenizer)
        self.auto_map = {"AutoProcessor": "asr_processing.ASRProcessor"}
        self.encoder, self.stack = encoder or {"model_type": "whisper"}, stack
        self.encoder_config = SimpleNamespace(**self.encoder)
        self.family = family_of(self.encoder_config)
        self.prompt_prefix, self.prompt_suffix = prompt_prefix, prompt_suffix
        self.audio_token, self.end_token = audio_token, end_token
        self.min_seconds, self.tail_seconds = min_seconds, tail_seconds
        self.max_seconds = min(max_seconds, self.longest_seconds)
        self.alphabet = list(alphabet)
        names = [audio_token, end_token]
        self.audio_token_id, self.end_token_id = tokenizer.convert_tokens_to_ids(names)
        if self.end_token_id is None or self.end_token_id == tokenizer.unk_token_id:
            raise ValueError(f"end_token {end_token!r} is not in the decoder's tokenizer")
        self.prefix_ids = tokenizer.encode(prompt_prefix, add_special_tokens=False)
        self.suffix_ids = tokenizer.encode(prompt_suffix, add_special_tokens=False)

    def features(self, samples: np.ndarray) -> torch.Tensor:
        """Mono 16 kHz samples (n,) -> features of one clip, time first: (n,) or (t, mels).

        Each clip is normalised on its own, so its features do not depend on its batch.
        """
        samples = normalise_level(samples)
        short = max(0, math.ceil(self.min_seconds * SAMPLE_RATE) - len(samples))
        tail = round(self.tail_seconds * SAMPLE_RATE)
        samples = np.pad(samples, (0, short + tail))
        out = self.feature_extractor(
            samples, sampling_rate=SAMPLE_RATE, padding=False, truncation=False, return_tensors="np"
        )
        return torch.from_numpy(self.family.features(out))

    def encoder_steps(self, steps: int) -> int:
        """Number of encoder frames for `steps` feature steps."""
        return self.family.frames(self.encoder_config, steps)

    def frames_for_seconds(self, seconds: float) -> int:
        """Number of encoder frames for a clip of `seconds`."""
        samples = int(max(seconds, self.min_seconds) * SAMPLE_RATE)
        samples += round(self.tail_seconds * SAMPLE_RATE)
        return self.encoder_steps(samples // self.family.hop)

    @property
    def frame_seconds(self) -> float:
        """Seconds between two encoder frames."""
        steps = 1_000_000
        return round(steps * self.family.hop / self.encoder_steps(steps)) / SAMPLE_RATE

    @property
    def longest_seconds(self) -> float:
        """Longest clip that the encoder can take."""
        return self.family.longest_seconds - self.tail_seconds

    def tokenize(self, text: str) -> list[int]:
        """Transcript -> token ids without the end token.

        Every word has a leading space, including the first. The CTC head and the decoder thus see
        the same tokens for a word in every position.
        """
        return self.tokenizer.encode(" " + text, add_special_tokens=False) if text else []

    def spell(self, text: str) -> list[int]:
        """Transcript -> classes of the character head, without characters that it lacks."""
        class_of = {byte: i for i, byte in enumerate(self.alphabet, 1)}
        return [class_of[byte] for byte in self.spoken(text).encode()]

    @property
    def space(self) -> int:
        """Class of the space in the character head, 0 if the script has none."""
        return self.alphabet.index(ord(" ")) + 1 if ord(" ") in self.alphabet else 0

    def spoken(self, text: str) -> str:
        """Reduce a transcript to the character head's alphabet and single spaces."""
        known = {*self.alphabet}
        kept = bytes(byte for byte in without_marks(text).encode() if byte in known)
        return " ".join(kept.decode(errors="ignore").split())

    def __call__(  # type: ignore[override]
        self,
        audio: AudioInput | Sequence[AudioInput],
        text: str | Sequence[str] | None = None,
        sampling_rate: int = SAMPLE_RATE,
    ) -> BatchFeature:
        """Build a left-padded batch from clips and, for training, their transcripts.

        Args:
            audio: one clip or a list of clips, each as `load_audio` accepts it.
            text: the transcripts; adds `labels` and `character_labels`.
            sampling_rate: Hz of arrays.

        Returns:
            `input_features` (b, samples) or (b, mels, frames), `input_features_mask` (b, samples
            or frames), `input_ids` and `attention_mask` (b, s). Transcripts add `labels` (b, s),
            -100 outside the transcript, and `character_labels` (b, n), padded with 0.

        Raises:
            AudioError: if a clip cannot be read.
        """
        clips: list[Any] = list(audio) if isinstance(audio, list | tuple) else [audio]
        features = [self.features(load_audio(clip, sampling_rate)) for clip in clips]
        if text is None:
            return self.collate(features)
        texts = [text] if isinstance(text, str) else text
        if len(texts) != len(clips):
            raise ValueError(f"{len(clips)} clips but {len(texts)} transcripts")
        return self.collate(features, [*map(self.tokenize, texts)], [*map(self.spell, texts)])

    def collate(
        self,
        features: list[torch.Tensor],
        targets: list[list[int]] | None = None,
        spelled: list[list[int]] | None = None,
        encoded: bool = False,
    ) -> BatchFeature:
        """Pad features of clips and, for training, token ids and character classes to a batch.

        With `encoded`, the features are encoder frames (t, d_encoder) from a cache, and
        `input_features` is (b, t, d_encoder).
        """
        batch: dict[str, Any] = {"encoded": True} if encoded else {}
        values = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)  # (b, n[, mels])
        is_mel = values.ndim == 3 and not encoded
        batch["input_features"] = values.transpose(1, 2) if is_mel else values
        lengths = torch.tensor([len(f) for f in features])
        batch["input_features_mask"] = torch.arange(values.shape[1]) < lengths[:, None]
        steps = [len(clip) if encoded else self.encoder_steps(len(clip)) for clip in features]
        batch.update(self.prompt(steps, targets))
        if spelled is not None:
            rows = [torch.tensor(row, dtype=torch.long) for row in spelled]
            batch["character_labels"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return BatchFeature(batch)

    def prompt(self, steps: Sequence[int], targets: list[list[int]] | None = None) -> BatchFeature:
        """Build the left-padded prompts of clips with `steps` encoder frames each.

        The token ids of `targets` follow their prompts. Returns `input_ids`, `attention_mask` and,
        with targets, `labels`, all (b, s).
        """
        rows, labels = [], []
        for i, frames in enumerate(steps):
            placeholders = [self.audio_token_id] * math.ceil(frames / self.stack)
            prompt = self.prefix_ids + placeholders + self.suffix_ids
            target = [] if targets is None else [*targets[i], self.end_token_id]
            rows.append(prompt + target)
            labels.append([IGNORE] * len(prompt) + target)
        batch = {"input_ids": _left_pad(rows, self.end_token_id)}
        batch["attention_mask"] = _left_pad([[1] * len(row) for row in rows], 0)
        if targets is not None:
            batch["labels"] = _left_pad(labels, IGNORE)
        return BatchFeature(batch)

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        """Token ids of one clip -> stripped text, by default without special tokens."""
        return self.tokenizer.decode(token_ids, **{"skip_special_tokens": True, **kwargs}).strip()


def _left_pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])
