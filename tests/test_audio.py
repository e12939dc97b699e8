"""Reading audio: formats, rates, channels, arrays; refusals; splitting long recordings."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import babble, split_at_pauses, tone, write_audio
from datasets import Audio, Dataset

from tiny_audio.asr.asr_audio import SAMPLE_RATE, AudioError, load_audio, read_audio
from tiny_audio.training.manifests import header_seconds

SECONDS = 4.0
FORMATS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "ogg": "vorbis",
    "opus": "libopus",
    "m4a": "aac",
}
# Opus has rates of its own; the other formats take any.
CASES = [
    (suffix, rate)
    for suffix in FORMATS
    for rate in (8000, 22050, 44100, 48000)
    if suffix != "opus" or rate in (8000, 48000)
]


def pitch(samples):
    """Frequency of the strongest component, Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)[spectrum.argmax()]


def loudness(samples):
    return float(np.sqrt(np.mean(np.square(samples))))


@pytest.mark.parametrize(("suffix", "rate"), CASES)
def test_every_format_and_rate(tmp_path, suffix, rate):
    left, right = tone(SECONDS, 440, rate), tone(SECONDS, 1000, rate, level=0.1)
    path = write_audio(tmp_path / f"a.{suffix}", np.stack([left, right]), rate, FORMATS[suffix])
    samples = load_audio(path)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    # M4A does not say where in its last frame (1,024 samples) the audio ends.
    slack = SAMPLE_RATE * max(0.01 * SECONDS, 1024 / rate if suffix == "m4a" else 0)
    assert len(samples) == pytest.approx(SECONDS * SAMPLE_RATE, abs=slack)
    assert pitch(samples) == pytest.approx(440, abs=2)
    # Both channels are in the mix, and in the ratio that they have in the file.
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    hz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    at = [spectrum[np.abs(hz - f) < 5].max() for f in (440, 1000)]
    assert at[1] / at[0] == pytest.approx(1 / 3, rel=0.25)
    assert np.abs(samples).max() <= 1.0
    same = load_audio(path.read_bytes())
    assert np.array_equal(same, samples)
    with path.open("rb") as file:
        assert np.array_equal(load_audio(file), samples)
    assert np.array_equal(load_audio(str(path)), samples)


def test_mono_keeps_its_level(tmp_path):
    """A mono file, the same in both channels of a stereo one, and an array: equally loud."""
    wave = tone(1.0, 440)
    levels = [
        loudness(load_audio(write_audio(tmp_path / "m.wav", wave, 16_000, "pcm_s16le"))),
        loudness(load_audio(write_audio(tmp_path / "s.wav", np.stack([wave] * 2), 16_000,
                                        "pcm_s16le"))),
        loudness(load_audio(np.stack([wave] * 2))),
        loudness(load_audio(wave)),
    ]  # fmt: skip
    assert levels == pytest.approx([0.3 / np.sqrt(2)] * 4, rel=0.02)


def test_a_file_at_16_khz_is_not_changed(tmp_path):
    wave = babble(0.7, 0).clip(-0.99, 0.99)
    samples = load_audio(write_audio(tmp_path / "a.flac", wave, 16_000, "flac"))
    assert len(samples) == len(wave)
    assert np.abs(samples - wave).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_arrays_of_any_rate(rate):
    samples = load_audio(tone(2.0, 440, rate), rate)
    assert len(samples) == pytest.approx(2.0 * SAMPLE_RATE, rel=0.01)
    assert pitch(samples) == pytest.approx(440, abs=2)
    assert loudness(samples) == pytest.approx(0.3 / np.sqrt(2), rel=0.02)
    assert np.array_equal(
        samples, load_audio({"array": tone(2.0, 440, rate), "sampling_rate": rate})
    )
    assert np.array_equal(samples, load_audio({"raw": tone(2.0, 440, rate), "sampling_rate": rate}))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float64, np.float16, np.float32])
def test_arrays_of_any_type(dtype):
    wave = tone(0.5)
    peak = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    samples = load_audio((wave * peak).astype(dtype))
    assert samples.dtype == np.float32
    assert np.abs(samples - wave).max() < 1e-3


@pytest.mark.parametrize("bits", [16, 32])
def test_lists_of_whole_numbers_have_16_or_32_bits(bits):
    wave = tone(0.5)
    whole = np.round(wave * (2 ** (bits - 1) - 1)).astype(np.int64)
    assert (
        np.abs(load_audio({"array": whole.tolist(), "sampling_rate": 16_000}) - wave).max() < 1e-3
    )


def test_unsigned_8_bit_has_its_zero_at_128():
    wave = tone(0.5)
    samples = load_audio((wave * 127 + 128).round().astype(np.uint8))
    assert np.abs(samples - wave).max() < 0.02


def test_channels_of_arrays():
    left, right = tone(0.5, 440), tone(0.5, 1000)
    mix = (left + right) / 2
    for array in (
        np.stack([left, right]),
        np.stack([left, right], axis=1),
        torch.from_numpy(np.stack([left, right])),
        left[None] * 0 + mix,
        np.asfortranarray(np.stack([left, right])),
    ):
        assert np.abs(load_audio(array) - mix).max() < 1e-6
    assert np.array_equal(load_audio(torch.from_numpy(left)), left)
    assert np.array_equal(load_audio(np.repeat(left, 2)[::2]), left)  # a view with strides


def test_a_column_of_datasets(tmp_path):
    """`datasets` gives torchcodec's decoders, which need FFmpeg's own libraries to run."""
    pytest.importorskip("torchcodec", exc_type=Exception)
    path = write_audio(tmp_path / "a.wav", tone(0.5), 16_000, "pcm_s16le")
    column = Dataset.from_dict({"audio": [str(path)] * 2}).cast_column("audio", Audio())["audio"]
    for clip in column:
        assert np.abs(load_audio(clip) - load_audio(path)).max() < 1e-6


def test_dict_forms(tmp_path):
    path = write_audio(tmp_path / "a.wav", tone(0.5), 16_000, "pcm_s16le")
    expected = load_audio(path)
    for form in (
        {"path": str(path), "bytes": None},
        {"bytes": path.read_bytes(), "path": "gone.wav"},
        {"path": str(path), "array": None, "sampling_rate": None},
    ):
        assert np.array_equal(load_audio(form), expected)
    with pytest.raises(AudioError, match="array, raw, bytes or path"):
        load_audio({"file": str(path)})


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "text", "empty", "cut", "video without sound"]
)
def test_files_that_are_no_audio_are_named(tmp_path, kind):
    path = tmp_path / "thing.wav"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("this is not a recording\n" * 20)
    elif kind == "empty":
        path.touch()
    elif kind == "cut":
        whole = write_audio(tmp_path / "whole.wav", tone(0.5), 16_000, "pcm_s16le")
        path.write_bytes(whole.read_bytes()[:30])
    elif kind == "video without sound":
        import av

        path = tmp_path / "thing.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            out.mux([*stream.encode(image), *stream.encode(None)])
    with pytest.raises(AudioError, match="thing"):
        load_audio(path)
    with pytest.raises(AudioError, match="thing"):
        load_audio(str(path))


def test_a_wav_file_without_samples(tmp_path):
    whole = write_audio(tmp_path / "whole.wav", tone(0.1), 16_000, "pcm_s16le")
    data = bytearray(whole.read_bytes())
    at = data.index(b"data")
    data[at + 4 : at + 8] = bytes(4)  # a data chunk of no length
    (tmp_path / "none.wav").write_bytes(data[: at + 8])
    with pytest.raises(AudioError, match=r"none\.wav"):
        load_audio(tmp_path / "none.wav")


@pytest.mark.parametrize(
    "array",
    [
        np.array([0.1, np.nan, 0.2], np.float32),
        np.array([0.1, np.inf, 0.2], np.float32),
        np.zeros(0, np.float32),
        np.zeros((2, 0), np.float32),
        np.zeros((2, 3, 4), np.float32),
    ],
    ids=["nan", "inf", "empty", "empty stereo", "three axes"],
)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_arrays_that_are_no_audio(array, rate):
    with pytest.raises(AudioError):
        load_audio(array, rate)


def test_a_recording_opens_no_other_file(tmp_path, monkeypatch):
    """FFmpeg tells a playlist by its content: uploaded, it would read our files aloud."""
    write_audio(tmp_path / "ours.flac", tone(1.0), 16_000, "flac")
    playlist = b"ffconcat version 1.0\nfile 'ours.flac'\n"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AudioError, match="not readable as audio"):
        load_audio(playlist)
    assert header_seconds({"bytes": playlist}) == -1.0


def test_a_name_with_a_colon(tmp_path, monkeypatch):
    write_audio(tmp_path / "2026-01-01T10:30.flac", tone(1.0), 16_000, "flac")
    monkeypatch.chdir(tmp_path)
    assert len(load_audio("2026-01-01T10:30.flac")) == 16_000
    assert header_seconds("2026-01-01T10:30.flac") == 1.0


def test_a_name_that_is_too_long_is_no_file():
    with pytest.raises(AudioError, match="not readable as audio"):
        load_audio("a" * 300 + ".wav")


@pytest.mark.parametrize("suffix", ["mp3", "adts"])
def test_files_that_were_joined_to_one_are_read_to_the_end(tmp_path, suffix):
    """Recorders and editors join files: channels and rate may change in the middle."""
    codec = {"mp3": "libmp3lame", "adts": "aac"}[suffix]
    one = write_audio(tmp_path / f"1.{suffix}", tone(2.0, 440), 16_000, codec)
    stereo = np.stack([tone(3.0, 880, 44_100)] * 2)
    other = write_audio(tmp_path / f"2.{suffix}", stereo, 44_100, codec)
    missing: list[str] = []
    samples = np.concatenate(
        list(read_audio(one.read_bytes() + other.read_bytes(), missing=missing))
    )
    assert all("damaged at 2.0 s" in line for line in missing)  # the tags of the second one
    assert len(samples) == pytest.approx(5 * SAMPLE_RATE, abs=0.2 * SAMPLE_RATE)
    assert pitch(samples[:30_000]) == pytest.approx(440, abs=2)
    assert pitch(samples[-40_000:]) == pytest.approx(880, abs=2)


def test_bytes_that_are_no_audio():
    for data in (b"", b"hello", b"RIFF" + bytes(100)):
        with pytest.raises(AudioError):
            load_audio(data)


# -- splitting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.01, 1.0, 2.0, 2.001, 7.3, 30.0])
@pytest.mark.parametrize("limit", [0.5, 2.0, 9.99])
def test_pieces_cover_the_recording_without_gap(seconds, limit):
    for samples in (babble(seconds, 3), np.zeros(round(seconds * SAMPLE_RATE), np.float32)):
        pieces = split_at_pauses(samples, limit)
        assert pieces[0][0] == 0
        assert pieces[-1][1] == len(samples)
        for (_, end), (start, _) in pairwise(pieces):
            assert end == start
        sizes = [end - start for start, end in pieces]
        assert min(sizes) > 0
        assert max(sizes) <= limit * SAMPLE_RATE
        # Cuts lie in the last half of what is allowed: not more pieces than needed for that.
        assert len(pieces) <= np.ceil(2 * seconds / limit) + 1


@pytest.mark.parametrize("at", [2.6, 3.4, 4.3])
def test_the_cut_lies_in_the_pause(at):
    pause = 0.4
    first, second = tone(at, 300), tone(6.0 - at, 500)
    samples = np.concatenate([first, np.zeros(round(pause * SAMPLE_RATE), np.float32), second])
    pieces = split_at_pauses(samples, 5.0)
    assert len(pieces) == 2
    cut = pieces[0][1] / SAMPLE_RATE
    assert at <= cut <= at + pause


def test_the_cut_avoids_speech_even_beside_silence():
    """A short, deep gap is better than a long, noisy one."""
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.standard_normal(SAMPLE_RATE // 2).astype(np.float32)
    hush = np.zeros(round(0.3 * SAMPLE_RATE), np.float32)
    samples = np.concatenate([tone(2.6), noise, tone(0.5), hush, tone(4.0)])
    cut = split_at_pauses(samples, 5.0)[0][1] / SAMPLE_RATE
    assert 3.6 <= cut <= 3.9


def test_channels_that_cancel_at_any_rate():
    clip = np.random.default_rng(0).standard_normal(44_100).astype(np.float32)
    assert np.abs(load_audio(np.stack([clip, -clip], 1), 44_100)).max() > 0.1


def test_a_track_in_a_codec_that_nobody_knows(tmp_path):
    data = bytearray(write_audio(tmp_path / "a.wav", tone(1.0), 16_000, "pcm_s16le").read_bytes())
    at = data.index(b"fmt ") + 8
    data[at : at + 2] = b"\x31\x00"  # GSM
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(AudioError, match=r"a\.wav"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(
    "source", [np.array(1.0), np.array(["a"]), np.array([None], object), io.StringIO("text")]
)
def test_other_objects_are_no_audio(source):
    with pytest.raises(AudioError):
        load_audio(source)


@pytest.mark.parametrize("rate", [0.5, float("inf"), float("nan"), 0, "fast"])
def test_rates_that_are_none(rate):
    with pytest.raises(AudioError, match="sampling_rate must be"):
        load_audio(tone(1.0), rate)
