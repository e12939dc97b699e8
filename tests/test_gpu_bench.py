"""`bench/gpu.py`: it runs here at toy sizes, so that the one run on a GPU is not wasted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXTS, babble

from tiny_audio.training.checks import Dropped
from tiny_audio.training.data import SpeechDataset

ROOT = Path(__file__).parents[1]
PARTS = ("training", "plan", "decoding", "precision", "resume", "learning")
STAND_INS = f"""
import sys
import time
sys.path.insert(0, {str(ROOT / "bench")!r})
import gpu

def fails(bench):
    yield {{"found": "before it failed"}}
    raise ValueError("broken")

def hangs(bench):
    yield {{"found": "before it hung"}}
    time.sleep(3600)

def works(bench):
    yield {{"found": "all"}}

known = {{"fails": (fails, 300), "hangs": (hangs, 60), "works": (works, 300)}}
gpu.PARTS = {{name: gpu.Part(*part) for name, part in known.items()}}
sys.exit(gpu.main())
"""


def run(script: Path, out: Path, *arguments: str) -> tuple[int, str, dict]:
    command = [sys.executable, str(script), "--tiny", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (out / "gpu.json").exists(), done.stderr[-2000:]
    return done.returncode, done.stdout, json.loads((out / "gpu.json").read_text())["parts"]


@pytest.mark.long
def test_every_part_has_a_result(tmp_path):
    code, printed, parts = run(ROOT / "bench/gpu.py", tmp_path, "--limit", "900")
    log = (tmp_path / "gpu.log").read_text()
    assert code == 0, (parts, log[-3000:])
    assert tuple(parts) == PARTS
    for name, part in parts.items():
        assert part["status"] == "ok" and part["rows"], (name, log[-3000:])
        assert f"## {name}: ok" in printed
    assert printed.strip().endswith((tmp_path / "gpu.md").read_text().strip())
    assert not [row for row in parts["training"]["rows"] if "error" in row]
    for row in parts["plan"]["rows"]:
        assert row["memory, measured / plan"] == pytest.approx(1, abs=0.2)
        assert row["work, measured / plan"] == pytest.approx(1, abs=0.2)
    assert all(row["WER % of the search"] < 50 for row in parts["decoding"]["rows"])
    assert parts["precision"]["rows"][-1]["finite"]
    assert parts["resume"]["rows"][0]["same"]
    assert "--assets" in parts["learning"]["rows"][0]["skipped"]
    code, printed, _ = run(ROOT / "bench/gpu.py", tmp_path)
    assert code == 0 and printed.count("already done, skipped") == len(PARTS)


@pytest.mark.long
def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STAND_INS)
    code, printed, parts = run(script, tmp_path)
    assert code == 1
    assert parts["fails"]["status"] == "failed with exit code 1"
    assert parts["hangs"]["status"] == "stopped after its limit of 60 s"
    assert parts["works"]["status"] == "ok"
    found = [part["rows"][0]["found"] for part in parts.values()]
    assert found == ["before it failed", "before it hung", "all"]
    assert "## hangs: stopped" in printed and "broken" in (tmp_path / "gpu.log").read_text()
    _, printed, _ = run(script, tmp_path, "--parts", "works")
    assert "works: already done, skipped" in printed


@pytest.mark.long
@pytest.mark.parametrize("name", ["FLAC", "MP3", "Opus"])
def test_the_table_that_measures_reading_holds_the_clips(name, build, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import loading

    clips = [(babble(8.4, seed), TEXTS[seed]) for seed in range(2)]
    loading.write_table(clips, loading.FORMATS[name], tmp_path / "clips.parquet")
    data = SpeechDataset([{"path": str(tmp_path / "clips.parquet")}], build()[0], Dropped())
    assert [example.text for example in data.examples] == [text for _, text in clips]
    for item, (samples, _) in zip([data[0], data[1]], clips, strict=True):
        assert len(item["features"]) == pytest.approx(len(samples) / 160, abs=30)  # Opus: 48 kHz
    assert loading.read_speed(data) > 1
