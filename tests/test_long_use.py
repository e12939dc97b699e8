"""Recordings of half an hour and more, and what is no speech, with real weights."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_audio
from test_serve import KINDS, Running, everywhere

from tiny_audio.asr.asr_audio import SAMPLE_RATE, load_audio, read_audio, split_blocks
from tiny_audio.asr.asr_pipeline import FLAGS, Piece, Recording
from tiny_audio.commands.serve import create_app
from tiny_audio.commands.speech import read_manifest
from tiny_audio.evaluation.scoring import score
from tiny_audio.loading import load_pipeline

pytestmark = pytest.mark.long
# A model of `make quickstart`; TINY_AUDIO_MODEL names another.
MODEL = os.environ.get("TINY_AUDIO_MODEL", "outputs/quickstart")


@pytest.fixture(scope="module")
def real():
    if not (Path(MODEL) / "config.json").exists():
        pytest.skip(f"no trained model in {MODEL}: make quickstart, or set TINY_AUDIO_MODEL")
    return load_pipeline(MODEL, "cpu")


def speech_bounds(samples: np.ndarray) -> tuple[float, float]:
    """Where a clean recording is louder than 3 % of its loudest 10 ms, seconds."""
    steps = samples[: len(samples) // 160 * 160].reshape(-1, 160)
    loud = np.sqrt(np.square(steps).mean(1))
    on = np.flatnonzero(loud > 0.03 * loud.max())
    return on[0] / 100, (on[-1] + 1) / 100


@pytest.fixture(scope="module")
def half_hour(real_bases, tmp_path_factory):
    """A FLAC of 30 minutes: held-out clips again and again, pauses of 0.5 to 1.2 s between them.

    Gives the file and, for each clip, its row, its samples and its offset in seconds.
    """
    rng = np.random.default_rng(0)
    rows = [
        (row, load_audio(manifest.parent / row["audio"]))
        for manifest in (real_bases.test, real_bases.librivox)
        for row in read_manifest(manifest)
        if row["duration"] < 15
    ]
    parts, clips, at = [], [], 0
    while at < 1800 * SAMPLE_RATE:
        row, samples = rows[rng.integers(len(rows))]
        clips.append((row, samples, at / SAMPLE_RATE))
        hush = 1e-4 * rng.standard_normal(rng.integers(8_000, 19_200)).astype(np.float32)
        parts += [samples, hush]
        at += len(samples) + len(hush)
    path = tmp_path_factory.mktemp("long") / "half_hour.flac"
    return write_audio(path, np.concatenate(parts), SAMPLE_RATE, "flac"), clips


def test_every_cut_lies_in_a_pause(half_hour, real):
    path, clips = half_hour
    pieces = list(split_blocks(read_audio(path), real.processor.max_seconds))
    spans = [(at + a, at + b) for _, x, at in clips for a, b in [speech_bounds(x)]]
    cuts = [at / SAMPLE_RATE for at, _ in pieces[1:]]
    assert len(cuts) >= 90
    inside = [(cut, span) for cut in cuts for span in spans if span[0] < cut < span[1]]
    # A cut may also lie in a pause of the speaker: there it is as quiet as between the clips.
    whole = load_audio(path)
    for cut, _ in inside:
        around = whole[round((cut - 0.05) * SAMPLE_RATE) : round((cut + 0.05) * SAMPLE_RATE)]
        assert np.abs(around).max() < 0.02, cut
    print(f"{len(cuts)} cuts, {len(inside)} of them within a clip, in its own pauses")


def test_a_long_recording_is_read_as_its_clips_are(half_hour, real):
    """The first 5 minutes: beams over half an hour take long on a CPU."""
    path, clips = half_hour
    minutes = float(os.environ.get("TINY_AUDIO_MINUTES", 5))
    clips = [c for c in clips if c[2] + len(c[1]) / SAMPLE_RATE < 60 * minutes]
    end = clips[-1][2] + len(clips[-1][1]) / SAMPLE_RATE
    whole = real(load_audio(path)[: round(end * SAMPLE_RATE)], return_timestamps="word")
    alone = real([samples for _, samples, _ in clips])
    said = " ".join(row["text"] for row, _, _ in clips)
    wer = {
        name: score([said], [text])["wer"]
        for name, text in (("whole", whole["text"]), ("alone", " ".join(a["text"] for a in alone)))
    }
    print(wer, len(clips), "clips", whole.get("warnings"))
    assert wer["whole"] <= wer["alone"] + 1.5
    times = [t for chunk in whole["chunks"] for t in chunk["timestamp"]]
    assert times == sorted(times)
    # Shown by what was decoded: the first word of each clip, the last one.
    errors = []
    for _, samples, at in clips:
        a, b = speech_bounds(samples)
        inside = [c["timestamp"] for c in whole["chunks"]
                  if at + a - 0.3 < np.mean(c["timestamp"]) < at + b + 0.3]  # fmt: skip
        if inside:
            errors.append((inside[0][0] - at - a, inside[-1][1] - at - b))
    median = np.median(np.abs(errors), axis=0)
    print("median error of first and last word, s:", median, "of", len(errors), "clips")
    frame = real.processor.frame_seconds * real.processor.stack
    assert len(errors) > 0.9 * len(clips) and (median <= frame).all()


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_a_word_before_a_long_pause_is_all_that_is_read(real, real_bases, floor):
    """A recorder that runs on: one word, 19 s of pause, a faint click."""
    rng = np.random.default_rng(0)
    rows = sorted(read_manifest(real_bases.test), key=lambda row: row["duration"])[:8]
    words = [load_audio(real_bases.test.parent / row["audio"]) for row in rows]
    pauses = [floor * rng.standard_normal(19 * SAMPLE_RATE).astype(np.float32) for _ in words]
    for word, pause in zip(words, pauses, strict=True):
        pause[-4000] = 0.01 * np.abs(word).max()
    alone = [found["text"] for found in real(words)]
    found = real([np.concatenate(parts) for parts in zip(words, pauses, strict=True)])
    texts = [item["text"] for item in found]
    assert all(len(text.split()) == 1 for text in texts), texts
    assert sum(a == b for a, b in zip(alone, texts, strict=True)) >= 4, (alone, texts)


@torch.no_grad()
def test_word_times_lie_where_the_speech_is(half_hour, real):
    """Forced alignment of what was said: within one projected frame (median)."""
    _, clips = half_hour
    errors = []
    for row, samples, _ in clips[:120]:
        piece = Piece(0.0, samples, text=row["text"])
        inputs = real.processor(samples)
        hidden, _ = real.model.encode(inputs["input_features"], inputs["input_features_mask"])
        real._time(piece, real.model.characters(hidden)[0].numpy(), 0, len(samples))
        a, b = speech_bounds(samples)
        first, last = piece.words[0]["timestamp"][0], piece.words[-1]["timestamp"][1]
        errors.append((first - a, last - b))
    median = np.median(np.abs(errors), axis=0)
    print("median error of first and last word, s:", median)
    assert (median <= real.processor.frame_seconds * real.processor.stack).all()


def test_real_speech_is_read_alike_everywhere(real, real_bases, tmp_path, capsys):
    """Twenty held-out clips, six formats: pipeline, command line, handler, endpoint and page."""
    rows = [r for r in read_manifest(real_bases.test) if r["duration"] < 6][:20]
    files = []
    for i, (row, kind) in enumerate(zip(rows, list(KINDS) * 4, strict=False)):
        samples, rate = load_audio(real_bases.test.parent / row["audio"]), (16_000, 48_000)[i % 2]
        loud = np.repeat(samples, rate // SAMPLE_RATE)
        files.append(write_audio(tmp_path / f"{i}.{kind}", loud, rate, KINDS[kind]))
    running = Running(create_app(real, "tiny"))
    texts = everywhere(files, MODEL, real, running.client(), capsys)
    running.stop()
    assert score([row["text"] for row in rows], texts)["wer"] < 50  # it is what was said


def coloured(rng: np.random.Generator, n: int, power: int) -> np.ndarray:
    """Noise (n,) whose energy falls with the frequency to this power, at most 1."""
    hz = np.maximum(np.fft.rfftfreq(n, 1 / SAMPLE_RATE), 1.0)
    x = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * hz ** (-power / 2), n)
    return np.asarray(x / np.abs(x).max())


def no_speech(seed: int, seconds: float) -> Iterator[tuple[str, np.ndarray]]:
    """Sixteen kinds of sound that nobody says, different ones for each seed."""
    rng, n = np.random.default_rng(seed), round(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    for power, level in product((0, 1, 2), (0.02, 0.3)):
        yield f"noise f^-{power} at {level}", level * coloured(rng, n, power)
    hz, slow = rng.uniform(150, 1500), rng.uniform(0.2, 3)
    clicks = np.zeros(n)
    clicks[rng.integers(0, n, 12)] = 0.9
    band = np.convolve(rng.standard_normal(n), np.hanning(40), "same")
    yield "tone", 0.3 * np.sin(2 * np.pi * hz * t)
    yield "chord", 0.1 * np.sum([np.sin(2 * np.pi * hz * k * t) for k in (1, 1.25, 1.5)], 0)
    yield "clicks", clicks
    yield "hum", 0.3 * np.sum([np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3, 5)], 0)
    yield "wind", 0.3 * coloured(rng, n, 2) * (0.6 + 0.4 * np.sin(2 * np.pi * slow * t))
    yield "sweep", 0.3 * np.sin(2 * np.pi * (100 * t + hz * t**2 / 2))
    yield "beeps", 0.3 * (np.sin(2 * np.pi * slow * t) > 0) * np.sin(2 * np.pi * hz * t)
    yield "noise at the pace of syllables", 0.4 * coloured(rng, n, 1) * np.sin(4 * np.pi * t) ** 2
    yield "band of noise", 0.2 * band / np.abs(band).max()
    yield "engine", 0.3 * np.sign(np.sin(hz / 3 * t)) * np.exp(-3 * (9 * slow * t % 1))


def music(tracks: slice, seconds: float) -> Iterator[tuple[str, np.ndarray]]:
    """Excerpts of the recordings in TINY_AUDIO_MUSIC, such as Asterisk's music on hold."""
    files = sorted(Path(os.environ.get("TINY_AUDIO_MUSIC", "/usr/share/asterisk/moh")).glob("*.*"))
    for file in files[tracks]:
        samples = load_audio(file)
        for at in np.linspace(0, len(samples) - seconds * SAMPLE_RATE, 9).astype(int):
            yield f"{file.stem} at {at / SAMPLE_RATE:.0f} s", samples[at:][: round(3 * SAMPLE_RATE)]


# Where MIN_SUPPORT and LOOP_CONFIDENCE are chosen and where they are tried: no clip, noise or track
# in both.
SETS = {
    "chosen": (["dev"], (1, 2), slice(0, 2)),
    "tried": (["test", "librivox"], (3, 4), slice(2, 5)),
}


@pytest.mark.parametrize("which", SETS)
def test_what_is_no_speech_is_empty_or_flagged(which, real, real_bases):
    manifests, seeds, tracks = SETS[which]
    noises = [clip for seed in seeds for clip in no_speech(seed, 3.0)] + [*music(tracks, 3.0)]
    spoken = [
        (row["id"], load_audio(path.parent / row["audio"]))
        for path in (getattr(real_bases, name) for name in manifests)
        for row in read_manifest(path)
        if row["duration"] < 29
    ]
    flagged = {}
    for kind, clips in (("no speech", noises), ("speech", spoken)):
        recordings = [Recording(samples.astype(np.float32)) for _, samples in clips]
        real._forward([piece for r in recordings for piece in real.preprocess(r)])
        results = [real.postprocess(recording) for recording in recordings]
        sure = [
            (min(p.confidence or 0.0 for p in recording.pieces), name, result["text"][:40],
             *(FLAGS.keys() & result.keys()))
            for (name, _), recording, result in zip(clips, recordings, results, strict=True)
            if result["text"]
        ]  # fmt: skip
        print(f"{which}, {kind}: {len(clips)} clips, {len(sure)} with a text; confidence:")
        print("\n".join(map(str, sorted(sure, reverse=kind == "no speech")[:8])))
        flagged[kind] = np.mean([not r["text"] or bool(FLAGS.keys() & r.keys()) for r in results])
    print(which, "empty or flagged:", flagged)
    assert len(noises) >= 50 or not [*music(tracks, 3.0)]
    assert flagged["no speech"] >= 0.98
    assert flagged["speech"] <= 0.02


def test_memory_is_flat_from_ten_minutes_to_three_hours(model_folder, tmp_path):
    """Peak of a fresh process, tiny model: what grows with the recording is all that counts."""
    rng = np.random.default_rng(0)
    minute = rng.standard_normal(60 * 8000).astype(np.float32) * 0.1
    peaks = {}
    # VmHWM and not ru_maxrss: a child inherits that from its parent, which holds 3 h of samples.
    code = (
        "import sys; from tiny_audio.commands.transcribe import load_pipeline; "
        "pipe = load_pipeline(sys.argv[1], 'cpu'); "
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1e6; "
        "before = peak(); "
        "r = pipe(sys.argv[2], return_timestamps='word'); "
        "print(r['duration'], before, peak())"
    )
    for minutes in (10, 180):
        path = write_audio(
            tmp_path / f"{minutes}.mp3", np.tile(minute, minutes), 8000, "libmp3lame"
        )
        run = [sys.executable, "-c", code, str(model_folder), str(path)]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        duration, before, peaks[minutes] = map(float, done.stdout.split())
        assert duration == pytest.approx(60 * minutes, abs=1)
        assert peaks[minutes] < before + 1.5
    print("peak memory, GB:", json.dumps(peaks), "of them before decoding", before)
    assert peaks[180] < peaks[10] + 0.2
