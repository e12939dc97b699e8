"""Any audio as 16 kHz mono samples; where its sound begins and ends, and where it is cut."""

import io
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import IO, Any, BinaryIO

import av
import httpx2 as httpx
import numpy as np
import torch

logger = logging.getLogger(__name__)
SAMPLE_RATE = 16_000  # Hz
CANCELLED = 0.1  # a mix below this share of the loudest channel's level has cancelled out
# A jump of a file's clock between these bounds (seconds) means that audio is missing.
MIN_GAP, MAX_GAP = 0.1, 600.0
ESTIMATED = ("mp3", "aac")  # containers whose duration is an estimate
HOP = SAMPLE_RATE // 100  # 10 ms: grid of the search for pauses
PAUSE_WINDOW = 20  # grid steps (0.2 s) over which the energy is averaged
SILENCE_BELOW = 1e-6  # share of the energy of the loudest 10 ms (-60 dB)
SILENCE_MARGIN = SAMPLE_RATE // 4  # silence that is kept around the speech of a piece

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
    if decode := getattr(source, "get_all_samples", None):  # torchcodec's, in columns of `datasets`
        found = decode()
        yield from read_audio(found.data, found.sample_rate, missing, notes)
        return
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        if not isinstance(sampling_rate, Real) or not 1 <= sampling_rate < math.inf:
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
        raise AudioError(f"cannot download {url}: {reason}") from error


@contextmanager
def open_audio(source: str | IO[bytes]) -> Iterator[Any]:
    """Open a local path or a file object as a PyAV container.

    FFmpeg detects playlists by their content, and a playlist could make it read other local files
    or URLs. Therefore it gets an open file, and may open nothing else.
    """
    with ExitStack() as stack:
        file = stack.enter_context(Path(source).open("rb")) if isinstance(source, str) else source
        # Set the mode: PyAV takes it from the file, and the file of an upload is also writable.
        yield stack.enter_context(av.open(file, mode="r", options={"protocol_whitelist": "none"}))


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
            # The one that a player would choose; FFmpeg has no choice if it knows no codec.
            track = container.streams.best("audio") or container.streams.audio[0]
            whole = track.duration and float(track.duration * (track.time_base or 0))
            if not whole and len(container.streams) == 1:  # Matroska states only the file's length
                whole = (container.duration or 0) / av.time_base
            for block in _blocks(container, track, missing, mixer):
                done += len(block)
                yield _finite(block, name)
            end, known = done / SAMPLE_RATE, whole and container.format.name not in ESTIMATED
            if missing is not None and known and end < 0.98 * whole - 1:
                missing.append(f"ends at {end:.1f} s of {whole:.1f}")
    except AudioError:
        raise
    except (av.FFmpegError, OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: not readable as audio ({reason})") from error
    if not done:
        raise AudioError(f"{name}: {'; '.join(['holds no samples', *(missing or [])])}")


def _channels(frame: Any) -> np.ndarray:
    """Samples (channels, n) of a packed frame: PyAV crashes on 8 or more planar channels."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T


def _blocks(
    container: Any, track: Any, missing: list[str] | None, mixer: Mixer
) -> Iterator[np.ndarray]:
    """Decode packet by packet, and continue after a damaged packet."""
    resampler, form = av.AudioResampler(format="flt", rate=SAMPLE_RATE), None  # keeps the channels
    packets = container.demux(track)
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
    shape, kind = samples.shape, samples.dtype
    if samples.ndim not in (1, 2) or samples.size == 0 or not np.issubdtype(kind, np.number):
        raise AudioError(f"a {kind} array of shape {shape} is not audio: expected (samples,)")
    if samples.dtype == np.int64:  # Python's integers: they hold 16 or 32 bits
        samples = samples.astype(np.int16 if np.abs(samples).max() <= 2**15 else np.int32)
    if np.issubdtype(samples.dtype, np.integer):
        limits = np.iinfo(samples.dtype)
        middle = (limits.max + limits.min + 1) // 2  # 0, or 128 for unsigned bytes
        samples = (samples.astype(np.float64) - middle) / (limits.max - middle)
    samples = _finite(samples.astype(np.float32), "array")
    if samples.ndim == 2:
        samples = mixer(samples if samples.shape[0] <= samples.shape[1] else samples.T)
    if rate != SAMPLE_RATE:
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None]), format="flt", layout="mono"
        )
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


def split_blocks(
    blocks: Iterable[np.ndarray], max_seconds: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Cut a recording that arrives in blocks into pieces of at most `max_seconds`.

    Yields the first sample's index and the samples of each piece, without gap or overlap. Each cut
    is at the quietest 0.2 s in the second half of the allowed length, which finds any pause there.
    """
    limit, margin = int(max_seconds * SAMPLE_RATE), PAUSE_WINDOW * HOP
    held: list[np.ndarray] = []
    size = at = 0
    for block in chain(blocks, [None]):  # None after the last block
        if block is not None:
            held.append(block)
            size += len(block)
        slack = 0 if block is None else margin
        while size > limit + slack:
            samples = np.concatenate(held)
            cut = _quietest(samples[: limit + margin], limit)
            yield at, samples[:cut]
            held, at, size = [samples[cut:]], at + cut, size - cut
    if size:
        yield at, np.concatenate(held)


def _energy(samples: np.ndarray) -> np.ndarray:
    """Return the mean square of each 10 ms: (n // HOP,)."""
    steps = len(samples) // HOP
    return np.square(samples[: steps * HOP]).reshape(steps, HOP).mean(1)


def loud_span(samples: np.ndarray) -> tuple[int, int]:
    """Return where sound first begins and last ends, in samples, widened by `SILENCE_MARGIN`.

    Silent means below `SILENCE_BELOW` times the energy of the loudest 10 ms.
    """
    energy = _energy(samples)
    loud = np.flatnonzero(energy > SILENCE_BELOW * energy.max(initial=0.0))
    if not len(loud):
        return 0, len(samples)
    first, last = loud[0] * HOP - SILENCE_MARGIN, (loud[-1] + 1) * HOP + SILENCE_MARGIN
    return max(0, first), min(len(samples), last)


def _quietest(samples: np.ndarray, limit: int) -> int:
    """Return the index of the quietest 0.2 s in the second half of the first `limit` samples."""
    around = PAUSE_WINDOW // 2, PAUSE_WINDOW // 2 - 1  # centres the window on each step
    energy = np.pad(_energy(samples), around, mode="edge")
    smooth = np.convolve(energy, np.ones(PAUSE_WINDOW) / PAUSE_WINDOW, mode="valid")
    low, high = limit // 2 // HOP, limit // HOP
    return (low + int(smooth[low:high].argmin())) * HOP
