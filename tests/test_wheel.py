"""The package as a wheel, in an environment and a folder far from any clone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import babble, write_audio, write_manifest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.long
TEXTS = ["go on", "stop here", "go home", "stop now"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """`bin` of a new environment that holds the wheel and what it asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", ROOT, "-w", folder]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("tiny_audio-*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    install = [folder / "venv/bin/pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, "torch==2.13.0"], check=True)
    subprocess.run([*install, f"{wheel}[quickstart]"], check=True)
    return folder / "venv/bin"


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_the_pinned_versions_exist_for_every_python_that_is_promised(python, tmp_path):
    """A distribution may have the first patch release, which newer packages may refuse."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    wheels = [pin for pin in pins if not pin.startswith("antlr4")]  # published as source only
    (tmp_path / "pins.txt").write_text("\n".join(wheels))
    ask = "install --quiet --dry-run --no-deps --ignore-installed --only-binary=:all:".split()
    where = ["--python-version", python, "--target", tmp_path, "-r", tmp_path / "pins.txt"]
    done = subprocess.run([sys.executable, "-m", "pip", *ask, *where], stderr=subprocess.PIPE)
    assert not done.returncode, done.stderr.decode()[-500:]


def test_everything_works_without_a_clone(environment, tiny_bases, tmp_path):
    rows = []
    for i, text in enumerate(TEXTS):
        write_audio(tmp_path / f"{i}.wav", babble(1.0 + i / 5, i), 16_000, "pcm_s16le")
        rows.append({"id": f"c{i}", "audio": f"{i}.wav", "text": text})
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    own = tmp_path / "presets" / "experiments"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "# @package _global_\n"
        f"model: {{encoder_model_name: {tiny_bases / 'whisper'}, "
        f"decoder_model_name: {tiny_bases / 'decoder'}, projector_hidden: 32}}\n"
        "training: {eval_strategy: 'no', max_steps: 4, batch_seconds: 31, warmup_steps: 1,\n"
        "  dataloader_num_workers: 0}\n"
    )
    data = [f"data.train=[{{path: {manifest}}}]"]

    def run(*command: str) -> str:
        done = subprocess.run(
            [environment / "tiny-audio", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr[-2000:])
        return done.stdout

    assert "quickstart" in run("--help")
    preset = ["--config-dir", str(tmp_path / "presets"), "+experiments=mine"]
    run("train", *preset, *data, "run.output_dir=out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert run("transcribe", "0.wav", "1.wav", "--model", "out", "--decode", "ctc")
    assert "WER" in run("eval", "out", "--dataset", str(manifest), "--out", "scored")
    bases = [f"model.encoder_model_name={tiny_bases / 'whisper'}"]
    bases += [f"model.decoder_model_name={tiny_bases / 'decoder'}"]
    assert "GFLOP" in run("plan", *bases, *data)
    checked = run("data", "check", *bases, *data, f"data.eval=[{{path: {manifest}}}]")
    assert re.search(r"^ +4 +0\.00 +0 +0", checked, re.MULTILINE)
    assert not list(tmp_path.glob("outputs/20*"))  # Hydra's own folders
