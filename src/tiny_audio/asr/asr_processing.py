"""Audio file -> 16 kHz mono -> features; text -> prompt, placeholder tokens, labels."""

import io
import logging
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, BinaryIO

import av
import httpx2 as httpx
import numpy as np
import torch
from av.stream import Disposition
from transformers import BatchFeature, ProcessorMixin

from .asr_config import IGNORE, WAVEFORM_ENCODERS, encoder_frames

logger = logging.getLogger(__name__)
SAMPLE_RATE = 16_000  # Hz
LOUD, LOUD_PERCENTILE = 0.1, 95  # target RMS (-20 dBFS) of the loudest twentieth of a clip
MAX_GAIN = 1e4  # 80 dB: digital silence stays silent
CANCELLED = 0.1  # a mix below this share of the loudest channel's level has cancelled out
# A jump of a file's clock between these bounds (seconds) means that audio is missing.
MIN_GAP, MAX_GAP = 0.1, 600.0
ESTIMATED = ("mp3", "aac")  # containers whose duration is an estimate

# Supported inputs: a path or URL, the bytes of a file, an open file, samples, or a dict.
AudioInput = str | Path | bytes | BinaryIO | np.ndarray | torch.Tensor | dict[str, Any]


class AudioError(ValueError):
    """Audio that cannot be read; the message names the file and the reason."""


def load_audio(source: AudioInput, sampling_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Load any audio as mono float32 samples at 16 kHz, in [-1, 1], shape (samples,).

    Accepts the inputs of `read_audio` and raises the same errors. Damaged audio is an error here.
    """
    return np.concatenate(list(read_audio(source, sampling_rate)))


def read_audio(
    source: AudioInput,
    sampling_rate: int = SAMPLE_RATE,
    missing: list[str] | None = None,
    notes: list[str] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the samples of `load_audio` in blocks: a file of any length takes little memory.

    FFmpeg decodes and resamples files through PyAV. Every format and rate that FFmpeg reads works,
    including the audio track of a video.

    Args:
        source: path, http(s) URL, bytes, file object, array of shape (samples,) or
            (channels, samples), or a dict with `array` or `raw` and `sampling_rate`, or with
            `bytes` or `path`, as `datasets` has them.
        sampling_rate: Hz of an array that does not come with its own.
        missing: receives a line for each stretch that cannot be decoded; the blocks contain silence
            there. None makes damage an error.
        notes: receives a line for each other warning. None logs it.

    Raises:
        AudioError: if there is no decodable, finite audio.
    """
    if isinstance(source, dict):
        keys = ("array", "raw", "bytes", "path")
        found = [source[key] for key in keys if source.get(key) is not None]
        if not found:
            raise AudioError(f"an audio dict needs array, raw, bytes or path; got {sorted(source)}")
        rate, audio = source.get("sampling_rate"), found[0]
        audio = np.asarray(audio) if isinstance(audio, list) else audio
        rate = sampling_rate if rate is None else rate
        yield from read_audio(audio, rate, missing, notes)
        return
    name = str(source) if isinstance(source, str | Path) else "audio"
    mixer = Mixer(name, notes)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        if not isinstance(sampling_rate, Real) or sampling_rate <= 0:
            raise AudioError(f"sampling_rate must be a positive number (Hz), not {sampling_rate!r}")
        samples = _resample(np.asarray(source), int(sampling_rate), mixer)
        # one-second blocks: pieces of a single block would keep a copy of the rest in memory
        yield from np.split(samples, range(SAMPLE_RATE, len(samples), SAMPLE_RATE))
        return
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = _fetch(source)
    elif isinstance(source, str | Path):
        source = str(Path(source).expanduser())
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    if not isinstance(source, str) and not hasattr(source, "read"):
        raise AudioError(f"a {type(source).__name__} is not audio: pass a path, bytes or samples")
    yield from _decode(source, name, missing, mixer)


class Mixer:
    """Mix channels down to mono, and detect channels that cancel each other.

    If one channel is the inverse of another (a balanced line, a wrong plug), their mean is silent.
    The mixer then uses the loudest channel.
    """

    def __init__(self, name: str, notes: list[str] | None) -> None:
        self.name, self.notes, self.warned = name, notes, False

    def __call__(self, channels: np.ndarray) -> np.ndarray:
        """(channels, n) -> (n,)."""
        mono = channels.mean(0)
        power = np.square(channels, dtype=np.float64).mean(1)
        if not np.square(mono, dtype=np.float64).mean() < CANCELLED**2 * power.max():
            return mono
        if not self.warned:
            self.warned = True
            self.note("the channels cancel each other: the louder one is used")
        return channels[power.argmax()]

    def note(self, line: str) -> None:
        """Report a warning about this file."""
        if self.notes is None:
            logger.warning("%s: %s", self.name, line)
        else:
            self.notes.append(line)


def _fetch(url: str) -> bytes:
    try:
        return httpx.get(url, follow_redirects=True, timeout=60).raise_for_status().content
    except httpx.HTTPError as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise AudioError(f"{url}: {reason}") from error


def open_audio(source: str | IO[bytes]) -> Any:
    """Open a local path or a file object as a PyAV container.

    FFmpeg detects playlists by their content, and an uploaded playlist could make it read local
    files. Therefore a file object cannot open anything else, and a path cannot open network URLs.
    """
    if isinstance(source, str):  # absolute, or a name with a colon would look like a protocol
        return av.open(str(Path(source).absolute()), options={"protocol_whitelist": "file"})
    # Set the mode: PyAV takes it from the file, and the file of an upload is also writable.
    return av.open(source, mode="r", options={"protocol_whitelist": "none"})


def _decode(
    source: str | IO[bytes], name: str, missing: list[str] | None, mixer: Mixer
) -> Iterator[np.ndarray]:
    done = 0
    try:
        with open_audio(source) as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: holds no audio track")
            if len(container.streams.audio) > 1:
                mixer.note(f"it has {len(container.streams.audio)} audio tracks: one is used")
            for block in _blocks(container, missing, mixer):
                done += len(block)
                yield _finite(block, name)
            stream = _track(container)
            if missing is not None and stream.duration and container.format.name not in ESTIMATED:
                total, end = float(stream.duration * (stream.time_base or 0)), done / SAMPLE_RATE
                if end < 0.98 * total - 1:
                    missing.append(f"ends at {end:.1f} s of {total:.1f}")
    except AudioError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: not readable as audio ({reason})") from error
    if not done:
        raise AudioError(f"{name}: {'; '.join(['holds no samples', *(missing or [])])}")


def _track(container: Any) -> Any:
    """Return the audio track that a player would play: the default one, else the first."""
    tracks = container.streams.audio
    return next((t for t in tracks if t.disposition & Disposition.default), tracks[0])


def _channels(frame: Any) -> np.ndarray:
    """Samples (channels, n) of a packed frame: PyAV crashes on 8 or more planar channels."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T


def _blocks(container: Any, missing: list[str] | None, mixer: Mixer) -> Iterator[np.ndarray]:
    """Decode packet by packet, and continue after a damaged packet."""
    resampler, form = av.AudioResampler(format="flt", rate=SAMPLE_RATE), None  # keeps the channels
    packets = container.demux(_track(container))
    packet, done = True, 0  # done: samples yielded so far
    clock = max(0, container.start_time or 0) / av.time_base  # expected start of the next frame (s)
    while packet is not None:
        at, blocks = done / SAMPLE_RATE, []
        try:
            packet = next(packets, None)  # None too after a damaged container raised
            for frame in [None] if packet is None else packet.decode():
                now = frame and (frame.layout.name, frame.format.name, frame.sample_rate)
                if now != form:  # end, or joined files of different format
                    blocks += [mixer(_channels(block)) for block in resampler.resample(None)]
                    resampler, form = av.AudioResampler(format="flt", rate=SAMPLE_RATE), now
                if frame is None:
                    break
                if frame.time is not None:
                    gap = frame.time - clock
                    clock = frame.time + frame.samples / frame.sample_rate
                    if missing is not None and MIN_GAP < gap < MAX_GAP:
                        if done:  # a video's sound may begin after its picture
                            missing.append(f"no audio from {at:.1f} to {at + gap:.1f} s")
                        blocks.append(np.zeros(round(gap * SAMPLE_RATE), np.float32))
                blocks += [mixer(_channels(block)) for block in resampler.resample(frame)]
        except (av.FFmpegError, ValueError) as error:
            if missing is None:
                raise
            if (line := f"damaged at {at:.1f} s ({error})") not in missing[-1:]:
                missing.append(line)
        for block in blocks:
            done += len(block)
            yield block


def _resample(samples: np.ndarray, rate: int, mixer: Mixer) -> np.ndarray:
    """Samples (n,) or (channels, n) in any dtype at `rate` Hz -> mono float32 at 16 kHz."""
    if samples.ndim > 2 or samples.size == 0:
        raise AudioError(f"an array of shape {samples.shape} is not audio: expected (samples,)")
    if samples.dtype == np.int64:  # Python's integers: they hold 16 or 32 bits
        samples = samples.astype(np.int16 if np.abs(samples).max() < 2**15 else np.int32)
    if np.issubdtype(samples.dtype, np.integer):
        limits = np.iinfo(samples.dtype)
        middle = (limits.max + limits.min + 1) // 2  # 0, or 128 for unsigned bytes
        samples = (samples.astype(np.float64) - middle) / (limits.max - middle)
    samples = _finite(samples.astype(np.float32), "array")
    if samples.ndim == 2:
        samples = mixer(samples if samples.shape[0] <= samples.shape[1] else samples.T)
    if rate != SAMPLE_RATE:
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        blocks = [*resampler.resample(frame), *resampler.resample(None)]
        samples = np.concatenate([np.zeros(0, np.float32), *(b.to_ndarray()[0] for b in blocks)])
    return _finite(samples, "array")


def _finite(samples: np.ndarray, name: str) -> np.ndarray:
    if not len(samples):
        raise AudioError(f"{name}: holds no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds NaN or infinite samples")
    return samples


def normalise_level(samples: np.ndarray) -> np.ndarray:
    """Scale samples (n,) until their loud parts have an RMS of `LOUD`, whatever the gain was."""
    size = SAMPLE_RATE // 40  # 25 ms
    frames = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    loud = np.percentile(np.sqrt(np.square(frames).mean(1)), LOUD_PERCENTILE)
    return (samples * min(LOUD / max(loud, 1e-9), MAX_GAIN)).astype(np.float32)


class ASRProcessor(ProcessorMixin):
    """Turn audio (and, for training, text) into inputs of `ASRModel`, and token ids into text.

    The prompt is a fixed string in the decoder's chat format: `prompt_prefix`, one placeholder per
    projected frame, `prompt_suffix`. SmolLM3's own chat template is not used, because it adds
    today's date.

    Args:
        feature_extractor: feature extractor of the encoder.
        tokenizer: tokenizer of the decoder.
        encoder: settings that determine the number of frames: `model_type`, `conv_kernel` and
            `conv_stride` of waveform encoders, `subsampling_factor` of Parakeet.
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
        self.prompt_prefix, self.prompt_suffix = prompt_prefix, prompt_suffix
        self.audio_token, self.end_token = audio_token, end_token
        self.min_seconds, self.tail_seconds = min_seconds, tail_seconds
        self.max_seconds, self.alphabet = max_seconds, list(alphabet)
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
        values = torch.from_numpy(np.asarray(out[self.feature_extractor.model_input_names[0]][0]))
        if self.encoder["model_type"] == "parakeet_encoder":  # time first; cut its padding frame
            return values[: int(out["attention_mask"][0].sum())]
        return values.T if values.ndim == 2 else values

    def encoder_steps(self, steps: int) -> int:
        """Number of encoder frames for `steps` feature steps."""
        return encoder_frames(SimpleNamespace(**self.encoder), steps)

    def frames(self, steps: int) -> int:
        """Number of projected frames, or placeholder tokens, for `steps` feature steps."""
        return math.ceil(self.encoder_steps(steps) / self.stack)

    def frames_for_seconds(self, seconds: float) -> int:
        """Number of projected frames for a clip of `seconds`."""
        samples = int(max(seconds, self.min_seconds) * SAMPLE_RATE)
        samples += round(self.tail_seconds * SAMPLE_RATE)
        return self.frames(samples // self.hop)

    @property
    def hop(self) -> int:
        """Samples per step of the encoder's input: 1 for a waveform, the hop for mel frames."""
        waveform = self.encoder["model_type"] in WAVEFORM_ENCODERS
        return 1 if waveform else self.feature_extractor.hop_length

    @property
    def frame_seconds(self) -> float:
        """Seconds between two encoder frames."""
        steps = 1_000_000
        frames = encoder_frames(SimpleNamespace(**self.encoder), steps)
        return round(steps * self.hop / frames) / SAMPLE_RATE

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
        kept = bytes(byte for byte in text.lower().encode() if byte in known)
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
