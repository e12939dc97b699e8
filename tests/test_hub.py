"""Pushing to and loading from a Hub: the real huggingface_hub against a server on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import serve
from safetensors.torch import load_file

from tiny_audio.hub import model_card

ROOT = Path(__file__).parents[1]
REPO = "someone/tiny-audio"


@pytest.fixture(scope="module")
def hub(tiny_bases):
    with serve() as server:
        server.add("base/whisper", tiny_bases / "whisper")
        server.add("base/decoder", tiny_bases / "decoder")
        yield server


def run(hub, home: Path, *command: str, token: str | None = "hf_secret", cwd: Path = ROOT):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    if token:
        env["HF_TOKEN"] = token
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)


def train(hub, home: Path, corpus: Path, output: Path, *overrides: str, **options):
    """The recipe of a plain `python src/train.py` on the tiny base models, by their Hub ids."""
    return run(
        hub, home, sys.executable, "src/train.py",
        "model.encoder_model_name=base/whisper", "model.decoder_model_name=base/decoder",
        "model.projector_hidden=32", "encoder_lora.r=2", "peft.r=2",
        f"data.train=[{{path: {corpus}}}]", f"data.eval=[{{path: {corpus}, sample: 2}}]",
        f"run.output_dir={output}", f"hydra.run.dir={home}",
        "training.max_steps=4", "training.save_steps=2", "training.logging_steps=2",
        "training.batch_seconds=6", "training.dataloader_num_workers=0", "+training.use_cpu=true",
        *overrides, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(hub, corpus, tmp_path_factory):
    """A run that pushed its checkpoints and its result."""
    home, output = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("out") / "model"
    done = train(hub, home, corpus, output, "training.push_to_hub=true")
    assert done.returncode == 0, done.stderr[-3000:]
    return home, output, done


def test_a_run_pushes_its_checkpoints_and_its_result(hub, trained):
    _, output, done = trained
    assert hub.messages[:3] == ["step 2", "step 4", "the finished model"]
    assert f"pushed to {hub.url}/{REPO}" in done.stdout
    files = hub.repos[REPO]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "asr_modeling.py"):
        assert files[name] == (output / name).read_bytes(), name
    for name in ("asr_ctc.py", "asr_encoder.py", "handler.py", "generation_config.json"):
        assert name in files
    assert not {n for n in files if "optimizer" in n or "/" in n or n.endswith((".pt", ".bin"))}
    assert "hf_secret" not in done.stdout + done.stderr


OTHERS = ("parakeet", "archive/lora_decoder", "mac_minimal")


@pytest.mark.parametrize(
    "name", ["stage1", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)]
)
def test_the_presets_run(hub, tiny_bases, corpus, tmp_path, name):
    """With their own Hub ids, under which this Hub holds small models of the same classes."""
    hub.add("facebook/hubert-xlarge-ls960-ft", tiny_bases / "hubert")
    hub.add("nvidia/parakeet-ctc-1.1b", tiny_bases / "parakeet")
    hub.add("openai/whisper-tiny.en", tiny_bases / "whisper")
    for decoder in ("HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        hub.add(decoder, tiny_bases / "decoder")
    stages = 1 if name == "mac_minimal" else 2
    short = [f"++stages.{i}.training.max_steps=2" for i in range(stages)]
    done = run(
        hub, tmp_path, sys.executable, "src/train.py", f"+experiments={name}", *short,
        f"data.train=[{{path: {corpus}}}]", f"data.eval=[{{path: {corpus}, sample: 2}}]",
        "data.max_seconds=5", f"run.output_dir={tmp_path / 'm'}",
        f"hydra.run.dir={tmp_path}", "training.dataloader_num_workers=0",
        "training.logging_steps=1", "model.projector_hidden=32", "training.batch_seconds=6",
        "+training.use_cpu=true", token=None,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "m/model.safetensors").exists()
    if stages == 2:
        assert "training.dtype=bfloat16 is off: this device does not have it" in done.stdout
        assert "stage projector" in done.stdout and "stage lora" in done.stdout
    loras = {n.split(".")[0] for n in load_file(tmp_path / "m/model.safetensors")
             if ".lora_" in n}  # fmt: skip
    assert loras == ({"decoder"} if "lora_decoder" in name else {"encoder", "decoder"})


def test_the_commits_of_the_base_models_are_recorded(hub, trained):
    config = json.loads(hub.repos[REPO]["config.json"])
    for part, base in (("encoder", "base/whisper"), ("decoder", "base/decoder")):
        assert config[f"{part}_name"] == base
        assert config[f"{part}_revision"] == hub.commit(base)


def test_the_model_card_tells_what_was_done(hub, trained):
    _, output, _ = trained
    card = hub.repos[REPO]["README.md"].decode()
    facts = json.loads((output / "finished.json").read_text())
    for said in (
        "library_name: transformers", "automatic-speech-recognition", "base/whisper",
        hub.commit("base/whisper"), "4 steps", "LoRA r 2 on q_proj, k_proj",
        f"{facts['trained']:,} of {facts['parameters']:,} parameters", "WER: not measured yet",
        facts["git_hash"],
    ):  # fmt: skip
        assert said in card, said
    (stage,) = output.glob("*/final")  # a stage's own folder has a card too
    assert "# final" in model_card(stage)


PIPELINE = """
import json, sys
sys.modules["tiny_audio"] = None
from transformers import pipeline
asr = pipeline("automatic-speech-recognition", sys.argv[1], trust_remote_code=True)
print("TEXTS", json.dumps([asr(f)["text"] for f in sys.argv[2:]]))
"""


def texts(done) -> list[str]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("TEXTS ")[1])


def test_the_pushed_model_says_what_the_local_one_says(hub, trained, corpus, tmp_path):
    home, output, _ = trained
    clips = [str(corpus.parent / f"wav/{i}.wav") for i in range(3)]
    python = (sys.executable, "-c", PIPELINE)
    local = texts(run(hub, home, *python, str(output), *clips))
    assert local == texts(run(hub, tmp_path, *python, REPO, *clips, token=None))
    assert any(local)


@pytest.mark.long
def test_push_by_hand_and_merged(hub, trained, corpus, tmp_path):
    home, output, _ = trained
    code = "import sys; from tiny_audio.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    command = (sys.executable, "-c", code, "push", str(output), "someone/whole", "--merged")
    done = run(hub, home, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{hub.url}/someone/whole"
    whole = hub.repos["someone/whole"]
    assert json.loads(whole["config.json"])["self_contained"]
    assert whole["training_config.yaml"] == (output / "training_config.yaml").read_bytes()
    assert len(whole["model.safetensors"]) > len(hub.repos[REPO]["model.safetensors"])
    clip = str(corpus.parent / "wav/0.wav")
    python = (sys.executable, "-c", PIPELINE)
    bases = {name: hub.repos.pop(name) for name in ("base/whisper", "base/decoder")}
    try:  # nothing else is needed
        alone = texts(run(hub, tmp_path, *python, "someone/whole", clip, token=None))
    finally:
        hub.repos |= bases
    assert alone == texts(run(hub, home, *python, str(output), clip))


@pytest.mark.long
def test_a_refused_push_costs_nothing(hub, trained, corpus, tmp_path):
    home, _, _ = trained
    push = ("training.push_to_hub=true", "training.hub_model_id=someone/else")
    hub.fail = True
    try:
        done = train(hub, home, corpus, tmp_path / "model", *push)
    finally:
        hub.fail = False
    assert done.returncode == 1
    assert "push to someone/else failed" in done.stderr.splitlines()[-1]
    assert (done.stdout + done.stderr).count("will retry at") == 2  # a warning for each checkpoint
    assert (tmp_path / "model/model.safetensors").exists()
    again = train(hub, home, corpus, tmp_path / "model", *push)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_pushing_without_a_token_is_refused_before_training(hub, corpus, tmp_path):
    done = train(hub, tmp_path, corpus, tmp_path / "m", "training.push_to_hub=true", token=None)
    assert done.returncode == 1 and "HF_TOKEN" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "m").exists()


@pytest.mark.long
def test_a_token_alone_publishes_nothing(hub, trained, corpus, tmp_path):
    """Many have one in order to read."""
    home, _, _ = trained
    before = list(hub.messages)
    done = train(hub, home, corpus, tmp_path / "m")
    assert done.returncode == 0 and hub.messages == before


@pytest.mark.long
def test_the_pushed_model_needs_four_packages(hub, trained, corpus, tmp_path):
    """A new environment with torch, transformers, peft and av, and nothing of ours."""
    _, output, _ = trained
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv/bin/python")
    packages = ["torch==2.13.0", "transformers", "peft", "av"]
    pip = [python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *packages], check=True)
    clip = str(corpus.parent / "wav/0.wav")
    home = tmp_path / "home"
    alone = texts(run(hub, home, python, "-c", PIPELINE, REPO, clip, token=None, cwd=tmp_path))
    here = (sys.executable, "-c", PIPELINE)
    assert alone == texts(run(hub, home, *here, str(output), clip))
