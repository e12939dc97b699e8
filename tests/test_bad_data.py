"""Broken recordings of thirty kinds beside good ones: each is named, no good one is lost."""

import csv
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import babble, tone, write_audio, write_manifest

from tiny_audio.commands import cli
from tiny_audio.training import train as runner
from tiny_audio.training.build import build_processor
from tiny_audio.training.checks import Dropped
from tiny_audio.training.data import SpeechDataset
from tiny_audio.training.manifests import read_source

READ = "unreadable audio"
BASES = [(f"model.{part}_model_name", "model", f"{part}_model_name") for part in
         ("encoder", "decoder")]  # fmt: skip


def half(path: Path, share: float = 0.5) -> Path:
    """Cut the file short."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def make_broken(folder: Path) -> list[tuple[dict, str]]:
    """Rows of a manifest whose files cannot be used, with the reason of each."""
    speech, rate = babble(1.5, 5), 16_000
    rows: list[tuple[dict, str]] = []

    def add(name: str, reason: str, text: str = "the cat sat", **more) -> Path:
        row = {"id": name, "audio": f"{name}.wav", "text": text, **more}
        rows.append((row, reason))
        return folder / row["audio"]

    def wav(name: str, samples: np.ndarray = speech, hz: int = rate) -> Path:
        return write_audio(folder / f"{name}.wav", samples, hz, "pcm_s16le")

    for suffix, codec in (("flac", "flac"), ("mp3", "libmp3lame"), ("ogg", "libvorbis")):
        codec = "vorbis" if codec == "libvorbis" else codec
        path = add(f"headless_{suffix}", READ, audio=f"headless.{suffix}", duration=1.5)
        path.write_bytes(
            write_audio(folder / f"x.{suffix}", speech, rate, codec).read_bytes()[700:720]
        )
    add("zero_length", READ).write_bytes(b"")
    add("zero_length_with_duration", READ, duration=1.0).write_bytes(b"")
    wav("header_only")
    half(add("header_only", READ), 44 / (44 + 2 * len(speech)))
    add("text_named_wav", READ).write_text("no audio in here " * 50)
    add("html_named_mp3", READ, audio="page.mp3").write_text("<html><body>404</body></html>" * 20)
    add("zip_named_wav", READ).write_bytes(b"PK\x03\x04" + os.urandom(400))
    add("random_bytes", READ).write_bytes(np.random.default_rng(0).bytes(3000))
    add("missing", READ)
    add("missing_with_duration", READ, duration=1.0)
    add("directory", READ).mkdir()
    add("broken_link", READ).symlink_to(folder / "nowhere.wav")
    add("loop_link", READ).symlink_to(folder / "loop_link.wav")
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        samples = speech.copy()
        samples[100] = value
        soundfile.write(add(f"{name}_samples", READ), samples, rate, subtype="FLOAT")
    write_audio(add("zeros", "silent"), np.zeros(rate), rate, "pcm_s16le")
    write_audio(add("zeros_stereo", "silent"), np.zeros((2, rate)), rate, "pcm_s16le")
    (folder / "picture.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 13, b"IHDR") + bytes(17)
    )
    add("picture", READ, audio="picture.png")
    write_audio(add("ten_ms", "shorter than min_seconds"), tone(0.01), rate, "pcm_s16le")
    write_audio(add("too_long", "over max_seconds"), tone(7.0), rate, "pcm_s16le")
    write_audio(
        add("minute_of_silence", "over max_seconds"), np.zeros(8000 * 60), 8000, "pcm_s16le"
    )
    for name, reason, text in (
        ("no_text", "empty text", ""),
        ("white_space", "empty text", " \t\n "),
        ("only_annotation", "empty text", "<noise> [laughter]"),
        ("null_text", "empty text", None),
        ("too_many_words", "more tokens than frames", "the cat sat on a red mat " * 20),
        ("too_few_letters", "implausible characters per second", "a"),
    ):
        wav(name, tone(4.0) if name == "too_few_letters" else speech)
        add(name, reason, text)
    wav("says_longer")
    add("says_too_long", "over max_seconds", audio="says_longer.wav", duration=99.0)
    add("negative_duration", READ, audio="says_longer.wav", duration=-3.0)
    write_audio(folder / "really_long.wav", tone(9.0), rate, "pcm_s16le")
    add("longer_than_said", "not as long as stated", audio="really_long.wav", duration=2.0)
    return rows


def make_good(folder: Path) -> list[dict]:
    """Unusual files that hold speech all the same."""
    speech, rows = babble(1.5, 6), []

    def add(name: str, **more) -> Path:
        rows.append({"id": name, "audio": name, "text": "the cat sat", **more})
        return folder / name

    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"):
        soundfile.write(add(f"{subtype}.wav"), speech, 16_000, subtype=subtype)
    soundfile.write(add("six_channels.wav"), np.stack([speech] * 6, 1), 16_000)
    for rate in (8_000, 22_050, 44_100, 96_000):
        soundfile.write(add(f"{rate}.wav"), babble(1.5 * rate / 16_000, 6), rate)
    wav = write_audio(folder / "right.wav", speech, 16_000, "pcm_s16le")
    add("wrong_extension.mp3").write_bytes(wav.read_bytes())
    add("no_extension").write_bytes(wav.read_bytes())
    return rows


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    rows = make_broken(folder)
    good = make_good(folder)
    manifest = write_manifest(folder / "m.jsonl", [*(row for row, _ in rows), *good])
    return manifest, {row["id"]: reason for row, reason in rows}, {row["id"] for row in good}


def test_thirty_kinds_of_bad_input_are_named_and_nothing_good_is_lost(
    broken, compose, corpus, tmp_path, capsys
):
    """A training run over all of it ends well; its report names each with its reason."""
    manifest, reasons, good = broken
    assert len(reasons) >= 30
    cfg = compose("data.max_dropped_fraction=0.9", "data.max_seconds=6", steps=(4, 1))
    cfg.data.train = [{"path": str(corpus)}, {"path": str(manifest)}]
    output = runner.train(cfg)
    lines = (output / "align" / "dropped.jsonl").read_text().splitlines()
    named = {row["id"]: row["reason"] for row in map(json.loads, lines)}
    assert named == reasons
    assert len(lines) == len(reasons)
    limits = ["data.max_seconds=6", f"data.train=[{{path: {corpus}}},{{path: {manifest}}}]"]
    limits += [f"{key}={cfg[group][name]}" for key, group, name in BASES]
    limits += [f"run.output_dir={tmp_path / 'check'}", "data.lowercase=true", "data.eval=null"]
    limits += ["training.eval_strategy=no"]
    for allowed, code in ((0.9, 0), (0.05, 1)):  # before training: the same names, and its end
        assert cli.main(["data", "check", *limits, f"data.max_dropped_fraction={allowed}"]) == code
        rows = (tmp_path / "check" / "data_check.jsonl").read_text().splitlines()
        assert {row["id"]: row["reason"] for row in map(json.loads, rows)} == reasons
    assert cli.main(["data", "check", *limits, f"data.words={tmp_path / 'gone.tsv'}"]) == 1
    said = capsys.readouterr()
    assert "gone.tsv: no such file" in said.err
    assert f"{len(good):>9,}" in said.out and "more than data.max_dropped_fraction" in said.err
    processor = build_processor(cfg)
    data = SpeechDataset([{"path": str(manifest)}], processor, Dropped(), max_seconds=6.0)
    readable = {item["id"] for item in map(data.read, data.examples) if "features" in item}
    assert readable == good


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_manifest_says_what_other_readers_find_in_it(real_bases, tmp_path, kind):
    """Plain json or csv and soundfile: the same ids, texts and durations."""
    lines = [json.loads(line) for line in real_bases.dev.read_text().splitlines()][:40]
    rows = [
        {"id": row["id"], "audio": str(real_bases.dev.parent / row["audio"]), "text": row["text"]}
        for row in lines
    ]
    path = tmp_path / f"m.{kind}"
    if kind == "jsonl":
        write_manifest(path, rows)
        plain = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with path.open(newline="") as file:
            plain = list(csv.DictReader(file))
    ours = list(read_source({"path": str(path)}))
    assert [(e.id, e.text) for e in ours] == [(row["id"], row["text"]) for row in plain]
    for example, row in zip(ours, plain, strict=True):
        info = soundfile.info(row["audio"])
        assert example.duration == pytest.approx(info.frames / info.samplerate, abs=1e-3)
