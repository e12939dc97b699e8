"""Long recordings with subtitles become training clips."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import babble, write_audio
from test_long_use import real, speech_bounds  # noqa: F401

from tiny_audio.asr.asr_audio import SAMPLE_RATE, load_audio
from tiny_audio.commands import cli, cut
from tiny_audio.commands.cut import Cue
from tiny_audio.training.manifests import read_source

CUES = [Cue(0.5, 2.0, "please hold"), Cue(2.5, 4.0, "goodbye"), Cue(4.5, 5.5, "thank you all")]
SRT = """1
00:00:00,500 --> 00:00:02,000
[phone
rings]
JO: <i>please</i>
hold

2
00:00:02,500 --> 00:00:04,000
- goodbye

3
00:00:04,200 --> 00:00:04,400
(laughs)

4
00:00:04,500 --> 00:00:05,500
thank you all
"""
VTT = "WEBVTT\n\n" + "\n\n".join(
    f"00:00:{c.start:06.3f} --> 00:00:{c.end:06.3f}\n{c.text}" for c in CUES
)
LABELS = "".join(f"{c.start}\t{c.end}\t{c.text}\n\\\t100.0\t900.0\n" for c in CUES)
TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
6
<exists>
1
"IntervalTier"
"speech"
0
6
3
0.5
2.0
"please hold"
2.5
4.0
"goodbye"
4.5
5.5
"thank you all"
"""


def written(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def talk(tmp_path) -> Path:
    return write_audio(tmp_path / "talk.wav", babble(6.0, 1), SAMPLE_RATE, "pcm_s16le")


@pytest.mark.parametrize(
    ("suffix", "text"),
    [(".srt", SRT), (".vtt", VTT), (".txt", LABELS), (".TextGrid", TEXTGRID)],
    ids=lambda value: value if value.startswith(".") else "",
)
def test_every_kind_of_subtitles_is_read(tmp_path, suffix, text):
    path = tmp_path / f"talk{suffix}"
    path.write_text(text, encoding="utf-8")
    assert cut.subtitles_of(tmp_path / "talk.mp3") == path
    assert cut.read_cues(path) == CUES


def test_the_clips_are_a_manifest(talk, model_folder, tmp_path, monkeypatch, capsys):
    """A random model hears nothing, so it is told to accept everything."""
    monkeypatch.setattr(cut, "MIN_CONFIDENCE", 0.0)
    talk.with_suffix(".srt").write_text(SRT)
    out = tmp_path / "clips"
    assert cut.main([str(talk), "--model", str(model_folder), "--out", str(out)]) == 0
    assert "3 clips in" in capsys.readouterr().out
    examples = list(read_source({"path": str(out / "clips.csv")}))
    assert [example.text for example in examples] == [cue.text for cue in CUES]
    whole = load_audio(talk)
    for example, row in zip(examples, written(out, "clips.csv"), strict=True):
        start, end = float(row["start"]), float(row["end"])
        assert 0 <= start < end <= 6 + cut.MARGIN
        first = round(max(0.0, start - cut.EDGE) * SAMPLE_RATE)
        samples = load_audio(example.audio)
        near = whole[first : first + len(samples)]
        assert len(samples) and np.abs(np.corrcoef(samples[: len(near)], near)[0, 1]) > 0.2


def test_what_is_not_heard_is_listed(talk, model_folder, tmp_path, capsys):
    rows = {
        "0.5\t2.0\tplease hold": "not heard there",
        "2.0\t3.0\t...": "not heard there",  # nothing to spell
        "2.0\t3.0\tδοκιμή": "letters that the model does not know: ήδικμο",
        "2.0\t3.0\tpress 7": "letters that the model does not know: 7",
        "0.0\t29.0\ttoo long": "longer than 2 s",
        "60.0\t62.0\tbehind the end": "outside the recording",
        "4.0\t2.0\tbackwards": "outside the recording",
        "nan\t2.0\tno time": "outside the recording",
        "5.9\t5.9\tno length": "not heard there",
    }
    talk.with_suffix(".txt").write_text("\n\n".join(rows), encoding="utf-8-sig")
    out = tmp_path / "clips"
    assert cut.main([str(talk), "--model", str(model_folder), "--out", str(out)]) == 0
    assert [row["refused"] for row in written(out, "refused.csv")] == [*rows.values()]
    assert not list(out.glob("*.flac"))
    assert "are these the subtitles of this recording?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "content", "said"),
    [
        (".srt", b"\xff\xfe\x00", "not readable as subtitles"),
        (".vtt", b"WEBVTT", "holds no subtitles"),
        (".txt", b"one\ttwo\tthree", "not readable as subtitles"),
        (".TextGrid", b"nothing of Praat's", "not readable as subtitles"),
        (".lrc", b"", "no subtitles beside it"),
    ],
)
def test_unreadable_subtitles_are_one_line(
    talk, model_folder, tmp_path, capsys, suffix, content, said
):
    talk.with_suffix(suffix).write_bytes(content)
    assert cut.main([str(talk), "--model", str(model_folder), "--out", str(tmp_path / "o")]) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and talk.stem in error


def test_nothing_is_overwritten(talk, model_folder, tmp_path, monkeypatch, capsys):
    """Two recordings may have one name; a folder that holds clips is refused."""
    monkeypatch.setattr(cut, "MIN_CONFIDENCE", 0.0)
    (tmp_path / "other").mkdir()
    other = shutil.copy(talk, tmp_path / "other" / talk.name)
    for path in (talk, other):
        path.with_suffix(".srt").write_text(SRT)
    run = [str(talk), str(other), "--model", str(model_folder), "--out", str(tmp_path / "clips")]
    assert cut.main(run) == 0
    rows = written(tmp_path / "clips", "clips.csv")
    assert len({row["audio"] for row in rows}) == len(rows) == 6
    with pytest.raises(SystemExit):
        cut.main(run)
    assert "holds clips already: name another folder" in capsys.readouterr().err
    assert written(tmp_path / "clips", "clips.csv") == rows
    (tmp_path / "clips/clips.csv").rename(tmp_path / "clips/refused.csv")
    with pytest.raises(SystemExit):  # nor are refused ones written twice
        cut.main(run)


def test_what_is_cut_before_an_interruption_is_kept(talk, model_folder, tmp_path, monkeypatch):
    def interrupted(pipe, samples, cue):
        if cue.text == "goodbye":
            raise KeyboardInterrupt
        return cue.start, cue.end, 1.0

    talk.with_suffix(".srt").write_text(SRT)
    monkeypatch.setattr(cut, "locate", interrupted)
    run = ["cut", str(talk), "--model", str(model_folder), "--out", str(tmp_path / "clips")]
    assert cli.main(run) == 130
    assert [row["text"] for row in written(tmp_path / "clips", "clips.csv")] == ["please hold"]


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pysubs2", None)
    monkeypatch.delitem(sys.modules, "tiny_audio.commands.cut")
    assert cli.main(["cut", "talk.mp3"]) == 1
    assert "pip install 'tiny-audio[cut]'" in capsys.readouterr().err


@pytest.mark.long
def test_texts_are_found_where_they_are_spoken(real, real_bases, tmp_path):  # noqa: F811
    """Ten minutes of unseen clips with pauses; subtitles up to half a second off, or wrong."""
    rows = [
        {**json.loads(line), "folder": path.parent}
        for path in (real_bases.test, real_bases.dev, real_bases.librivox)
        for line in path.read_text().splitlines()
    ]
    rows = [row for row in rows if row["duration"] < 17]
    rng = np.random.default_rng(0)
    rng.shuffle(rows)
    parts: list[np.ndarray] = []
    cues, true, at = [], [], 0.0
    for row in rows:
        clip = load_audio(row["folder"] / row["audio"])
        pause = np.zeros(int(rng.uniform(0.1, 0.8) * SAMPLE_RATE), np.float32)
        start, end = (at + bound for bound in speech_bounds(clip))
        true.append((start, end))
        off = rng.uniform(-0.5, 0.5, 2)
        cues.append(Cue(max(0.0, start + off[0]), end + off[1], row["text"]))
        parts += [clip, pause]
        at += (len(clip) + len(pause)) / SAMPLE_RATE
    samples = np.concatenate(parts)
    found = [cut.locate(real, samples, cue) for cue in cues]
    kept = np.array([sure >= cut.MIN_CONFIDENCE for *_, sure in found])
    errors = np.abs([[f[0] - t[0], f[1] - t[1]] for f, t in zip(found, true, strict=True)])
    assert (~kept).mean() <= 0.02
    assert np.median(errors[kept], axis=0).max() <= 0.1
    half = len(cues) // 2
    others = [Cue(c.start, c.end, cues[i - half].text) for i, c in enumerate(cues)]
    wrong = [c for c, cue in zip(others, cues, strict=True) if c.text != cue.text]
    least = cut.MIN_CONFIDENCE
    assert np.mean([cut.locate(real, samples, cue)[2] >= least for cue in wrong]) <= 0.03
    late = [Cue(c.start + 10, c.end + 10, c.text) for c in cues if c.end < at - 12]
    assert np.mean([cut.locate(real, samples, cue)[2] >= least for cue in late]) <= 0.02
