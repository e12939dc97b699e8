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

from .asr_config import IGNORE, encoder_frames

logger = logging.getLogger(__name__)
SAMPLE_RATE = 16_000  # Hz
LOUD, LOUD_PERCENTILE = 0.1, 95  # -20 dBFS of the loudest twentieth of a clip
MOST_GAIN = 1e4  # 80 dB: digital silence stays silent
CANCELLED = 0.1  # of the loudest channel's level: a mix below it has lost what they share
# A jump of a file's clock within these bounds, in seconds, is audio that is missing.
LEAST_GAP, MOST_GAP = 0.1, 600.0
ESTIMATED = ("mp3", "aac")  # containers whose duration is a guess

# What can be transcribed: a path or URL, the bytes of a file, an open file, samples, or a dict.
AudioInput = str | Path | bytes | BinaryIO | np.ndarray | torch.Tensor | dict[str, Any]


class AudioError(ValueError):
    """Audio that cannot be read; the message names the file and what is wrong with it."""


def load_audio(source: AudioInput, sampling_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Any audio as mono float32 samples at 16 kHz, in [-1, 1], shape (samples,).

    Takes and raises what `read_audio` does; damaged audio is an error here.
    """
    return np.concatenate(list(read_audio(source, sampling_rate)))


def read_audio(
    source: AudioInput,
    sampling_rate: int = SAMPLE_RATE,
    missing: list[str] | None = None,
    notes: list[str] | None = None,
) -> Iterator[np.ndarray]:
    """The samples of `load_audio` in blocks, so that a file of any length takes little memory.

    Files are decoded, resampled and mixed down by FFmpeg through PyAV, so every format and rate
    that FFmpeg reads works, the audio track of a video too.

    Args:
        source: path, http(s) URL, bytes, file object, array of shape (samples,) or
            (channels, samples), or a dict with `array` or `raw` and `sampling_rate`, or with
            `bytes` or `path`, as `datasets` has them.
        sampling_rate: Hz, of an array that does not say its own.
        missing: is given a line for each stretch that cannot be decoded, which is silence in the
            blocks. None: damage is an error.
        notes: is given a line for what else should be known. None: it is logged.

    Raises:
        AudioError: for anything that holds no decodable, finite audio.
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
            raise AudioError(f"sampling_rate is a number of Hz above 0, not {sampling_rate!r}")
        samples = _resample(np.asarray(source), int(sampling_rate), mixer)
        # in seconds: each piece cut from it in one would keep a copy of all the rest alive
        yield from np.split(samples, range(SAMPLE_RATE, len(samples), SAMPLE_RATE))
        return
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = _fetch(source)
    elif isinstance(source, str | Path):
        source = str(Path(source).expanduser())
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    if not isinstance(source, str) and not hasattr(source, "read"):
        raise AudioError(f"a {type(source).__name__} is no audio: see read_audio for what is")
    yield from _decode(source, name, missing, mixer)


class Mixer:
    """Mixes channels down, and notices where they cancel each other.

    A channel that is another one inverted (a balanced line, a wrong plug) leaves nothing of a mean:
    the loudest is taken there instead.
    """

    def __init__(self, name: str, notes: list[str] | None) -> None:
        self.name, self.notes, self.said = name, notes, False

    def __call__(self, channels: np.ndarray) -> np.ndarray:
        """(channels, n) -> (n,)."""
        mono = channels.mean(0)
        power = np.square(channels, dtype=np.float64).mean(1)
        if not np.square(mono, dtype=np.float64).mean() < CANCELLED**2 * power.max():
            return mono
        if not self.said:
            self.said = True
            self.note("the channels cancel each other: the louder one is read")
        return channels[power.argmax()]

    def note(self, line: str) -> None:
        """Say what should be known of this file."""
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
    """PyAV's container of a local path or an open file.

    FFmpeg tells a playlist by its content: one that was sent in for a recording would have it read
    our files aloud, so an open file opens nothing else, and a path nothing from the network.
    """
    if isinstance(source, str):  # absolute: a name with a colon would be taken for a protocol
        return av.open(str(Path(source).absolute()), options={"protocol_whitelist": "file"})
    # The mode is ours: an upload's file is open for writing too, and PyAV would go by that.
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
                mixer.note(f"it has {len(container.streams.audio)} audio tracks: one is read")
            for block in _blocks(container, missing, mixer):
                done += len(block)
                yield _finite(block, name)
            stream = _track(container)
            if missing is not None and stream.duration and container.format.name not in ESTIMATED:
                says, there = float(stream.duration * (stream.time_base or 0)), done / SAMPLE_RATE
                if there < 0.98 * says - 1:
                    missing.append(f"ends at {there:.1f} s of {says:.1f}")
    except AudioError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: not readable as audio ({reason})") from error
    if not done:
        raise AudioError(f"{name}: {'; '.join(['holds no samples', *(missing or [])])}")


def _track(container: Any) -> Any:
    """The audio track that a player plays: the default one, or else the first."""
    tracks = container.streams.audio
    return next((t for t in tracks if t.disposition & Disposition.default), tracks[0])


def _channels(frame: Any) -> np.ndarray:
    """(channels, n) of a packed frame; PyAV crashes on planes of eight channels and more."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T


def _blocks(container: Any, missing: list[str] | None, mixer: Mixer) -> Iterator[np.ndarray]:
    """Decode packet by packet, so that the packets behind a damaged one are still read."""
    resampler, form = av.AudioResampler(format="flt", rate=SAMPLE_RATE), None  # keeps the channels
    packets = container.demux(_track(container))
    packet, done = True, 0  # samples given
    clock = max(0, container.start_time or 0) / av.time_base  # where the next frame should begin, s
    while packet is not None:
        at, blocks = done / SAMPLE_RATE, []
        try:
            packet = next(packets, None)  # it ends, if the container itself is damaged
            for frame in [None] if packet is None else packet.decode():
                now = frame and (frame.layout.name, frame.format.name, frame.sample_rate)
                if now != form:  # the end, or a part of other channels or rate, of files joined
                    blocks += [mixer(_channels(block)) for block in resampler.resample(None)]
                    resampler, form = av.AudioResampler(format="flt", rate=SAMPLE_RATE), now
                if frame is None:
                    break
                if frame.time is not None:
                    gap = frame.time - clock
                    clock = frame.time + frame.samples / frame.sample_rate
                    if missing is not None and LEAST_GAP < gap < MOST_GAP:
                        if done:  # else the sound of a video begins after its picture
                            missing.append(f"nothing from {at:.1f} to {at + gap:.1f} s")
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
        raise AudioError(f"an array of shape {samples.shape} is not audio: (samples,) is expected")
    if samples.dtype == np.int64:  # Python's integers: they hold 16 or 32 bits
        samples = samples.astype(np.int16 if np.abs(samples).max() < 2**15 else np.int32)
    if np.issubdtype(samples.dtype, np.integer):
        limits = np.iinfo(samples.dtype)
        middle = (limits.max + limits.min + 1) // 2  # 0, or 128 of unsigned bytes
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
    """Samples (n,) whose loud parts have an RMS of `LOUD`: the encoder need not know the gain."""
    size = SAMPLE_RATE // 40  # 25 ms
    frames = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    loud = np.percentile(np.sqrt(np.square(frames).mean(1)), LOUD_PERCENTILE)
    return (samples * min(LOUD / max(loud, 1e-9), MOST_GAIN)).astype(np.float32)


class ASRProcessor(ProcessorMixin):
    """Turns audio (and, for training, text) into what `ASRModel` takes, and ids into text.

    The prompt is one fixed string of the decoder's chat format, `prompt_prefix` + one placeholder
    per projected frame + `prompt_suffix`: SmolLM3's own template would add today's date.

    Args:
        feature_extractor: the encoder's own.
        tokenizer: the decoder's own.
        encoder: what the number of frames depends on: `model_type` and, for waveform encoders,
            `conv_kernel` and `conv_stride`.
        stack: encoder frames in a projected frame.
        prompt_prefix, prompt_suffix: text around the audio.
        audio_token: name of the placeholder, added to the tokenizer.
        end_token: ends every transcript.
        min_seconds: shorter clips are padded with silence to this length.
        tail_seconds: silence appended to every clip, which steadies the last frames.
        max_seconds: longest piece that the model is given; the pipeline splits what is longer.
        alphabet: byte of each class of the character head from 1 on; empty without such a head.
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
            raise ValueError(f"end_token {end_token!r} is no token of the decoder's tokenizer")
        self.prefix_ids = tokenizer.encode(prompt_prefix, add_special_tokens=False)
        self.suffix_ids = tokenizer.encode(prompt_suffix, add_special_tokens=False)

    def features(self, samples: np.ndarray) -> torch.Tensor:
        """Mono 16 kHz samples (n,) -> features of this clip alone, time first: (n,) or (t, mels).

        Each clip is normalised on its own, never with its batch, so a batch changes nothing.
        """
        samples = normalise_level(samples)
        short = max(0, math.ceil(self.min_seconds * SAMPLE_RATE) - len(samples))
        tail = round(self.tail_seconds * SAMPLE_RATE)
        samples = np.pad(samples, (0, short + tail))
        out = self.feature_extractor(
            samples, sampling_rate=SAMPLE_RATE, padding=False, truncation=False, return_tensors="np"
        )
        values = torch.from_numpy(np.asarray(out[self.feature_extractor.model_input_names[0]][0]))
        if self.encoder["model_type"] == "parakeet_encoder":  # time first, a frame of padding last
            return values[: int(out["attention_mask"][0].sum())]
        return values.T if values.ndim == 2 else values

    def encoder_steps(self, steps: int) -> int:
        """Encoder frames for `steps` feature steps."""
        return encoder_frames(SimpleNamespace(**self.encoder), steps)

    def frames(self, steps: int) -> int:
        """Projected frames, which is placeholder tokens, for `steps` feature steps."""
        return math.ceil(self.encoder_steps(steps) / self.stack)

    def frames_for_seconds(self, seconds: float) -> int:
        """Projected frames for a clip of so many seconds."""
        samples = int(max(seconds, self.min_seconds) * SAMPLE_RATE)
        samples += round(self.tail_seconds * SAMPLE_RATE)
        hop = getattr(self.feature_extractor, "hop_length", 1)  # waveform encoders have none
        return self.frames(samples // hop)

    @property
    def frame_seconds(self) -> float:
        """Seconds between two encoder frames."""
        hop, many = getattr(self.feature_extractor, "hop_length", 1), 1_000_000
        frames = encoder_frames(SimpleNamespace(**self.encoder), many)
        return round(many * hop / frames) / SAMPLE_RATE

    def tokenize(self, text: str) -> list[int]:
        """Transcript -> token ids without the end token.

        Every word is given its leading space, the first too, so that a word has one spelling for
        the CTC head and the decoder wherever it stands.
        """
        return self.tokenizer.encode(" " + text, add_special_tokens=False) if text else []

    def spell(self, text: str) -> list[int]:
        """Transcript -> classes of the character head; what is not in its alphabet is left out."""
        class_of = {byte: i for i, byte in enumerate(self.alphabet, 1)}
        return [class_of[byte] for byte in self.spoken(text).encode()]

    @property
    def space(self) -> int:
        """The character head's class of the space, 0 where the script has none."""
        return self.alphabet.index(ord(" ")) + 1 if ord(" ") in self.alphabet else 0

    def spoken(self, text: str) -> str:
        """Transcript as the character head spells it: in its alphabet, single spaces."""
        known = {*self.alphabet}
        heard = bytes(byte for byte in text.lower().encode() if byte in known)
        return " ".join(heard.decode(errors="ignore").split())

    def __call__(  # type: ignore[override]
        self,
        audio: AudioInput | Sequence[AudioInput],
        text: str | Sequence[str] | None = None,
        sampling_rate: int = SAMPLE_RATE,
    ) -> BatchFeature:
        """A left-padded batch from clips and, for training, their transcripts.

        Args:
            audio: one clip or a list of them, each as `load_audio` takes it.
            text: the transcripts; adds `labels`.
            sampling_rate: Hz, of arrays.

        Returns:
            `input_features` (b, samples) or (b, mels, frames), `input_features_mask` (b, samples
            or frames), `input_ids` and `attention_mask` (b, s); with transcripts `labels` (b, s),
            -100 outside them, and `character_labels` (b, n), 0 behind their ends.

        Raises:
            AudioError: for a clip that cannot be read.
        """
        clips: list[Any] = list(audio) if isinstance(audio, list | tuple) else [audio]
        features = [self.features(load_audio(clip, sampling_rate)) for clip in clips]
        texts = [text] if isinstance(text, str) else text
        if texts is not None and len(texts) != len(clips):
            raise ValueError(f"{len(clips)} clips but {len(texts)} transcripts")
        if texts is None:
            return self.collate(features)
        targets, spelled = ([f(t) for t in texts] for f in (self.tokenize, self.spell))
        return self.collate(features, targets, spelled)

    def collate(
        self,
        features: list[torch.Tensor],
        targets: list[list[int]] | None = None,
        spelled: list[list[int]] | None = None,
        encoded: bool = False,
    ) -> BatchFeature:
        """Pad clips' features (see `features`) and, for training, their token ids and character
        classes to a batch.

        With `encoded` the features are encoder frames (t, d_encoder), as a cache holds them, and
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
        """The left-padded prompts of clips with so many encoder frames, each followed by its token
        ids, if there are any: `input_ids`, `attention_mask` and then `labels`, all (b, s)."""
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
        """Token ids of one clip -> text, without outer space and, unless asked, special tokens."""
        return self.tokenizer.decode(token_ids, **{"skip_special_tokens": True, **kwargs}).strip()


def _left_pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])
