"""Disturbances are what their names say, repeat by their seed, and leave the words in place."""

import numpy as np
import pytest
from conftest import babble, tone, write_audio, write_manifest

from tiny_audio.asr.asr_audio import SAMPLE_RATE
from tiny_audio.asr.asr_processing import normalise_level
from tiny_audio.training import augment
from tiny_audio.training.augment import disturb
from tiny_audio.training.checks import Dropped
from tiny_audio.training.data import SpeechDataset
from tiny_audio.training.frames import Frames, cache_frames


def only(monkeypatch, name: str) -> None:
    """Let one disturbance happen always, and no other."""
    monkeypatch.setattr(
        augment, "PROBABILITIES", {key: key == name for key in augment.PROBABILITIES}
    )


def share_of_power(samples: np.ndarray, low: float, high: float) -> float:
    """Of the frequencies between two, in Hz."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    frequency = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    return power[(frequency >= low) & (frequency <= high)].sum() / power.sum()


def test_a_seed_repeats_what_it_drew():
    clip = babble(2.0, 1)
    for seed in range(20):
        a, b = (disturb(clip, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(a, b) and a.dtype == np.float32 and np.isfinite(a).all()
    assert not np.array_equal(a, disturb(clip, np.random.default_rng(99)))


def test_nothing_drawn_is_nothing_changed(monkeypatch):
    only(monkeypatch, "none")
    clip = babble(1.0, 1)
    assert np.array_equal(disturb(clip, np.random.default_rng(0)), clip)


def test_speed_moves_length_and_pitch_together(monkeypatch):
    only(monkeypatch, "speed")
    for seed in range(5):
        made = disturb(tone(2.0, 1000), np.random.default_rng(seed))
        speed = 2.0 * SAMPLE_RATE / len(made)
        assert augment.SPEED[0] <= speed <= augment.SPEED[1]
        assert share_of_power(made, 1000 * speed - 20, 1000 * speed + 20) > 0.95


def test_pauses_are_silent_and_the_clip_is_whole(monkeypatch):
    only(monkeypatch, "pause")
    clip = babble(1.0, 2)
    lengths = set()
    for seed in range(10):
        made = disturb(clip, np.random.default_rng(seed))
        starts = (at for at in range(len(made)) if np.array_equal(made[at : at + 50], clip[:50]))
        before = next(starts)
        assert np.array_equal(made[before : before + len(clip)], clip)
        assert not made[:before].any() and not made[before + len(clip) :].any()
        lengths.add(len(made))
    assert len(lengths) > 5


def test_noise_is_as_loud_as_it_was_drawn(monkeypatch):
    only(monkeypatch, "noise")
    clip = babble(3.0, 3)
    ratios = []
    for seed in range(40):
        added = disturb(clip, np.random.default_rng(seed)) - clip
        ratios.append(20 * np.log10(augment.rms(clip) / augment.rms(added)))
    low, high = augment.SNR
    assert low - 0.1 <= min(ratios) < low + 8 and high - 8 < max(ratios) <= high + 0.1


def test_hum_music_telephone_and_clipping(monkeypatch):
    rng = np.random.default_rng(0)
    assert share_of_power(augment.hum(SAMPLE_RATE * 2, rng), 45, 500) > 0.99
    assert share_of_power(augment.music(SAMPLE_RATE * 2, rng), 80, 8000) > 0.95
    only(monkeypatch, "telephone")
    white = np.random.default_rng(1).standard_normal(SAMPLE_RATE).astype(np.float32)
    assert share_of_power(disturb(white, rng), 95, 3805) > 0.999
    only(monkeypatch, "clipping")
    cut = disturb(tone(1.0), rng)
    assert (np.abs(cut) > 0.999 * np.abs(cut).max()).mean() > 0.5


def test_a_room_keeps_the_direct_sound_first(monkeypatch):
    only(monkeypatch, "reverberation")
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[1000] = 1.0
    made = disturb(click, np.random.default_rng(0))
    assert len(made) == len(click) and np.abs(made[:1000]).max() < 1e-6
    assert made[1000] == pytest.approx(1.0, abs=1e-3) and np.abs(made[1001:]).max() < 0.5


def test_every_copy_of_a_clip_is_disturbed_anew_and_cached(build, tmp_path):
    """Each has an id and frames of its own, as long as it has become; the seed repeats them."""
    processor, model = build("whisper")
    rows = []
    for i in range(3):
        write_audio(tmp_path / f"{i}.wav", babble(1.0, i), SAMPLE_RATE, "pcm_s16le")
        rows.append({"id": f"c{i}", "audio": f"{i}.wav", "text": "go on", "duration": 1.0})
    source = {"path": str(write_manifest(tmp_path / "m.jsonl", rows)), "repeat": 3}

    def made(seed: int) -> SpeechDataset:
        return SpeechDataset([source], processor, Dropped(), disturb=1.0, seed=seed)

    data = made(0)
    assert [e.id for e in data.examples[:3]] == ["c0", "c0#1", "c0#2"]
    features = [data[i]["features"] for i in range(9)]
    assert len({tuple(f.flatten()[:400].tolist()) for f in features}) == 9
    again, other = made(0), made(1)
    assert all(np.array_equal(f, again[i]["features"]) for i, f in enumerate(features))
    assert not all(np.array_equal(f, other[i]["features"]) for i, f in enumerate(features))
    cache_frames(model, data, tmp_path)
    (folder,) = tmp_path.glob("encoder_frames-*")
    for example in data.examples:
        frames = Frames(folder)[example.id]
        assert example.duration == pytest.approx(len(frames) * processor.frame_seconds)
    assert len({len(Frames(folder)[e.id]) for e in data.examples}) > 3


def test_the_level_of_the_speech_is_the_same_whatever_it_was():
    clip = babble(2.0, 4)
    wanted = normalise_level(clip)
    for gain in (3e-4, 0.03, 20.0):
        assert np.abs(normalise_level(gain * clip) - wanted).max() < 1e-4
    padded = np.concatenate([np.zeros(SAMPLE_RATE, np.float32), clip])
    assert augment.rms(normalise_level(padded)[SAMPLE_RATE:]) == pytest.approx(
        augment.rms(wanted), rel=0.3
    )
    assert not normalise_level(np.zeros(100, np.float32)).any()


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_a_short_word_before_a_long_pause_keeps_its_level(floor):
    """Where sound fills less than a twentieth, a percentile of all levels is that of the pause."""
    clip = babble(1.0, 4)
    pause = floor * np.random.default_rng(0).standard_normal(28 * SAMPLE_RATE).astype(np.float32)
    found = normalise_level(np.concatenate([clip, pause]))[:SAMPLE_RATE]
    assert 0.5 < augment.rms(found) / augment.rms(normalise_level(clip)) < 2.2


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0, 6.0, 29.0])
def test_a_click_does_not_turn_the_speech_down(seconds):
    clip = babble(seconds, 4)
    clicked = clip.copy()
    clicked[5000:5040] = 1.0
    before, after = normalise_level(clip), normalise_level(clicked)
    assert augment.rms(after[6000:]) == pytest.approx(augment.rms(before[6000:]), rel=0.2)


def test_the_length_of_a_disturbed_clip_is_known_before_it_is_read(build, tmp_path):
    rows = []
    for i in range(30):
        path = write_audio(tmp_path / f"{i}.wav", babble(0.5 + i / 20, i), SAMPLE_RATE, "pcm_s16le")
        rows.append(
            {"id": f"clip{i}", "audio": str(path), "text": "hello", "duration": 0.5 + i / 20}
        )
    source = {"path": str(write_manifest(tmp_path / "clips.jsonl", rows))}
    processor, _ = build("whisper")
    data = SpeechDataset([source], processor, Dropped(), disturb=0.8, max_seconds=4.0)
    for epoch in (0, 3):
        data.set_epoch(epoch)
        lengths = data.lengths(epoch)
        read = [
            len(data.disturbed(babble(e.duration, i), e)) / SAMPLE_RATE
            for i, e in enumerate(data.examples)
        ]
        assert np.allclose(read, lengths, atol=2e-3)
        assert len({round(s, 2) for s in lengths}) > 20
    assert data.lengths(0) != data.lengths(3)
    plain = SpeechDataset([source], processor, Dropped(), max_seconds=4.0)
    shorter = plain.lengths(0)
    processor.tail_seconds = 0.2  # the features span it too, so it counts in a batch
    assert np.allclose(plain.lengths(0), np.array(shorter) + 0.2)
    steps = [len(plain[i]["features"]) for i in range(len(plain))]
    assert np.allclose(np.array(steps) / 100, plain.lengths(0), atol=0.02)
