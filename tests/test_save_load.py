"""What is saved is what is loaded: in another process, and without this package.

One subprocess loads all the folders (importing torch takes longer than the rest together).
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LORAS, TEXTS, babble, write_audio
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from tiny_audio.asr import asr_modeling
from tiny_audio.asr.asr_audio import load_audio
from tiny_audio.asr.asr_config import ASRConfig
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_pipeline import ASRPipeline
from tiny_audio.asr.asr_processing import ASRProcessor
from tiny_audio.asr.asr_saving import CODE, WEIGHTS
from tiny_audio.training import train as runner
from tiny_audio.training.build import build_processor
from tiny_audio.training.checks import read_log
from tiny_audio.training.run_log import LOG

# The last positions: a transcript. Before it the number of positions depends on the bridge, which
# leaves out blank frames.
TEXT = slice(-3, None)
CODE_FOLDER = Path(asr_modeling.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
CASES = [
    (encoder, lora, whole)
    for encoder, lora in (("whisper", "both"), ("whisper", "encoder"), ("whisper", "decoder"),
                          ("whisper", "neither"), ("hubert", "both"))
    for whole in (False, True)
]  # fmt: skip


def run_python(code: str, *args: object, hide: bool = False, **env: str) -> str:
    """Run `code` in a new process; `hide` makes this package impossible to import there."""
    if hide:
        code = "import sys; sys.modules['tiny_audio'] = None\n" + textwrap.dedent(code)
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **env,
        },
        timeout=300,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


def name_of(case) -> str:
    encoder, lora, whole = case
    return f"{encoder}-{lora}-{'whole' if whole else 'parts'}"


@pytest.fixture(scope="module")
def saved(build, clips, tmp_path_factory):
    """A folder for each case with the logits that its model gave before it was saved."""
    folder = tmp_path_factory.mktemp("saved")
    for case in CASES:
        encoder, lora, whole = case
        processor, model = build(encoder, lora=lora, bridge="posteriors", seed=len(lora))
        batch = processor(clips[:2], list(TEXTS[:2]))
        batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        target = folder / name_of(case)
        model.save_pretrained(target, self_contained=whole)
        processor.save_pretrained(target)
        torch.save({"batch": dict(batch), "logits": logits}, target / "expected.pt")
    return folder


@pytest.fixture(scope="module")
def loaded_elsewhere(saved):
    """What a new process computes from the same folders, by case."""
    run_python(
        """
        import sys, pathlib, torch
        from tiny_audio.asr.asr_modeling import ASRModel
        from tiny_audio.asr.asr_processing import ASRProcessor
        for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            model = ASRModel.from_pretrained(folder)
            batch = torch.load(folder / "expected.pt")["batch"]
            with torch.no_grad():
                torch.save(model(**batch).logits, folder / "logits.pt")
        """,
        saved,
    )
    return {case: torch.load(saved / name_of(case) / "logits.pt") for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_new_process_gives_identical_logits(saved, loaded_elsewhere, case):
    expected = torch.load(saved / name_of(case) / "expected.pt")["logits"]
    assert torch.equal(loaded_elsewhere[case], expected)


@pytest.mark.parametrize("lora", [name for name in LORAS if name != "neither"])
def test_the_lora_matters_to_those_logits(saved, lora):
    """The comparison above would pass with LoRA dropped on both sides: here it is dropped."""
    folder = saved / name_of(("whisper", lora, False))
    expected = torch.load(folder / "expected.pt")
    model = ASRModel.from_pretrained(folder)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_B" in key:
                parameter.zero_()
        logits = model(**expected["batch"]).logits
    assert (logits[:, TEXT] - expected["logits"][:, TEXT]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_processor_comes_back(saved, clips, case):
    folder = saved / name_of(case)
    processor = ASRProcessor.from_pretrained(folder)
    again = processor(clips[:2], list(TEXTS[:2]))
    for key, value in torch.load(folder / "expected.pt")["batch"].items():
        assert torch.equal(again[key], value), key


def values_in(tree):
    """All keys and values of nested JSON."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            yield from values_in(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_in(value)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_choice_of_this_run_is_saved(saved, tiny_bases, case):
    folder = saved / name_of(case)
    for path in folder.glob("*.json"):
        tree = json.loads(path.read_text())
        keys = {key for key, _ in values_in(tree)} if path.name == "config.json" else set()
        assert not keys & {"dtype", "torch_dtype", "attn_implementation", "_attn_implementation"}
        if case[2]:
            assert str(tiny_bases) not in path.read_text(), f"{path.name} names a local folder"
    weights = load_file(folder / WEIGHTS)
    ours = ("projector.", "ctc.", "characters.", "residual.")
    trained = {n for n in weights if n.startswith(ours)}
    assert trained
    ours = trained | {n for n in weights if ".lora_" in n}
    assert (set(weights) == ours) != case[2]
    for part, rank in zip(("encoder", "decoder"), LORAS[case[1]], strict=True):
        assert any(n.startswith(part) and ".lora_" in n for n in weights) == (rank > 0)


def test_a_local_base_makes_the_save_self_contained(build, tmp_path):
    _, model = build("whisper")
    model.save_pretrained(tmp_path / "a")
    assert ASRConfig.from_pretrained(tmp_path / "a").self_contained
    # And what is loaded from it and saved again stays so.
    again = ASRModel.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / x / WEIGHTS) for x in "ab")
    assert set(first) == set(second)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_saving_does_not_disturb_the_model(build, clips, tmp_path):
    processor, model = build("whisper", lora="both")
    batch = processor(clips[:2])
    before = model(**batch).logits
    for whole in (True, False):
        model.save_pretrained(tmp_path / "m", self_contained=whole)
        assert model.config.self_contained is False
        assert Path(model.config.encoder_name).is_dir()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("encoder", "dtype"), [("whisper", "bfloat16"), ("hubert", "bfloat16"),
                                                ("hubert", "float16")])  # fmt: skip
def test_half_precision_of_the_base_models(saved, clips, encoder, dtype, whole):
    folder = saved / name_of((encoder, "both", whole))
    model = ASRModel.from_pretrained(folder, dtype=dtype)
    assert model.decoder.lm_head.weight.dtype == getattr(torch, dtype)
    assert model.encoder.dtype == getattr(torch, dtype)
    assert model.projector.output_norm.weight.dtype == torch.float32
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        logits = model(**expected["batch"]).logits.float()
    pair = logits[:, TEXT], expected["logits"][:, TEXT]
    assert torch.nn.functional.cosine_similarity(*pair, dim=-1).mean() > 0.95


# -- damaged folders -----------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "mis-shaped"])
@pytest.mark.parametrize(
    "name", ["projector.up_proj.weight", "ctc.log_scale", "decoder.*q_proj.lora_B*"]
)
def test_tensors_that_do_not_match_are_named(saved, tmp_path, whole, damage, name):
    folder = shutil.copytree(saved / name_of(("whisper", "both", whole)), tmp_path / "m")
    tensors = load_file(folder / WEIGHTS)
    start, _, end = name.partition("*")
    key = next(n for n in tensors if n.startswith(start) and end.strip("*") in n)
    if damage == "missing":
        del tensors[key]
    elif damage == "unexpected":
        key = key + "x"
        tensors[key] = torch.zeros(3)
    else:
        tensors[key] = torch.zeros(*tensors[key].shape, 2)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError) as error:
        ASRModel.from_pretrained(folder)
    assert damage in str(error.value)
    assert key in str(error.value)


def test_a_base_tensor_that_is_missing_is_named(saved, tmp_path):
    folder = shutil.copytree(saved / name_of(("whisper", "neither", True)), tmp_path / "m")
    tensors = load_file(folder / WEIGHTS)
    key = next(n for n in tensors if n.startswith("encoder.layers.0"))
    del tensors[key]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"missing tensors.*{key}"):
        ASRModel.from_pretrained(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_missing_file_is_named(saved, tmp_path, name):
    folder = shutil.copytree(saved / name_of(("whisper", "both", True)), tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(OSError, match=name):
        ASRModel.from_pretrained(folder)


def test_a_missing_folder_or_base_is_named(saved, tmp_path):
    with pytest.raises(OSError, match="gone"):
        ASRModel.from_pretrained(tmp_path / "gone")
    folder = shutil.copytree(saved / name_of(("whisper", "both", False)), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["decoder_name"] = str(tmp_path / "moved-away")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="moved-away"):
        ASRModel.from_pretrained(folder)


def test_a_base_that_lacks_weights_is_an_error(build, tiny_bases, tmp_path):
    base = shutil.copytree(tiny_bases / "whisper", tmp_path / "whisper")
    tensors = load_file(base / WEIGHTS)
    key = next(n for n in tensors if "encoder.layers.1" in n)
    del tensors[key]
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    key = key.partition("encoder.")[2]  # as the encoder by itself calls it
    config = ASRConfig(encoder_name=str(base), decoder_name=str(tiny_bases / "decoder"))
    with pytest.raises(ValueError, match=key):
        ASRModel.from_base(config)


def test_unknown_loading_arguments_are_refused(saved):
    with pytest.raises(ValueError, match="did you mean 'dtype'"):
        ASRModel.from_pretrained(saved / name_of(CASES[0]), dtyp="bfloat16")


# -- without this package ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(real_clips, tmp_path_factory):
    """One recording as WAV, as MP3 at 44.1 kHz in stereo, and another one as a NumPy file."""
    folder = tmp_path_factory.mktemp("inputs")
    write_audio(folder / "a.wav", real_clips[0], 16_000, "pcm_s16le")
    at_441 = np.interp(
        np.arange(round(len(real_clips[0]) * 2.75625)) / 2.75625,
        np.arange(len(real_clips[0])),
        real_clips[0],
    )
    write_audio(folder / "a.mp3", np.stack([at_441, 0.5 * at_441]), 44_100, "libmp3lame")
    np.save(folder / "b.npy", babble(1.2, 9))
    return folder


@pytest.fixture(scope="module")
def alone(saved, inputs, tmp_path_factory):
    """Texts out of a process that cannot import tiny_audio, and the same from this one."""
    folder = saved / name_of(("whisper", "both", True))
    out = run_python(
        """
        import importlib.util, json, pathlib, numpy as np
        try:
            import tiny_audio
        except ImportError:
            pass
        else:
            raise SystemExit("tiny_audio can be imported: this test shows nothing")
        from transformers import pipeline
        model, inputs = sys.argv[1], pathlib.Path(sys.argv[2])
        pipe = pipeline("automatic-speech-recognition", model=model, trust_remote_code=True)
        wav, mp3, array = str(inputs / "a.wav"), str(inputs / "a.mp3"), np.load(inputs / "b.npy")
        data = (inputs / "a.wav").read_bytes()
        spec = importlib.util.spec_from_file_location("handler", model + "/handler.py")
        handler = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(handler)
        endpoint = handler.EndpointHandler(model)
        plain = {"decode": "generate"}
        again = str(inputs / "saved again")
        pipe.save_pretrained(again, max_shard_size="50GB")  # as push_to_hub calls it
        again = pipeline("automatic-speech-recognition", model=again, trust_remote_code=True)
        print("RESULT" + json.dumps({
            "again": again(wav),
            "code": sorted(p.stem for p in (inputs / "saved again").glob("*.py")),
            "wav": pipe(wav),
            "mp3": pipe(mp3),
            "array": pipe(array),
            "dict": pipe({"raw": array, "sampling_rate": 16000}),
            "bytes": pipe(data),
            "list": pipe([wav, array, mp3]),
            "endpoint": endpoint({"inputs": data}),
            "endpoint decoder": endpoint({"inputs": data, "parameters": plain}),
            "module": type(pipe.model).__module__,
        }))
        """,
        folder,
        inputs,
        hide=True,
        HF_MODULES_CACHE=str(tmp_path_factory.mktemp("modules")),
    )
    pipe = ASRPipeline(
        model=ASRModel.from_pretrained(folder), processor=ASRProcessor.from_pretrained(folder)
    )
    here = {
        "wav": pipe(str(inputs / "a.wav")),
        "mp3": pipe(load_audio(inputs / "a.mp3")),
        "array": pipe(np.load(inputs / "b.npy")),
        "decoder": pipe(str(inputs / "a.wav"), decode="generate"),
    }
    return json.loads(out.partition("RESULT")[2]), here


def test_the_folder_works_without_the_package(alone):
    there, here = alone
    assert there["module"].startswith("transformers_modules.")
    assert there["wav"]["text"]
    assert there["array"]["text"] != there["wav"]["text"]
    for key in ("wav", "mp3", "array"):
        assert there[key] == here[key], key
    assert there["dict"] == here["array"]
    assert there["bytes"] == here["wav"]
    assert there["list"] == [here["wav"], here["array"], here["mp3"]]
    assert there["again"] == here["wav"]  # saved in that process: with all its code
    assert there["code"] == sorted(CODE)
    assert {p.stem for p in CODE_FOLDER.glob("asr_*.py")} | {"handler"} == set(CODE)


def test_the_endpoint_answers_as_the_pipeline_does(alone):
    there, here = alone
    assert there["endpoint"] == here["wav"]
    assert there["endpoint decoder"] == here["decoder"]


# -- trained, saved, loaded, continued -----------------------------------------------------------


def run_and_keep_logits(cfg, batch, monkeypatch):
    """Run a recipe; returns its folder and the logits of `batch` just before the last save."""
    kept = {}
    original = ASRModel.save_pretrained

    def save_pretrained(self, folder, **kwargs):
        if Path(folder).name == "final":
            self.eval()
            with torch.no_grad():
                kept["logits"] = self(**batch).logits
        original(self, folder, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ASRModel, "save_pretrained", save_pretrained)
        return runner.train(cfg), kept["logits"]


def check_combination(cfg, lora, batch, folder, monkeypatch):
    """Train, save, load in a new process: the same logits; continue: the same loss."""
    cfg.encoder_lora.r, cfg.peft.r = LORAS[lora]
    cfg.training.cache_encoder = False
    cfg.training.eval_strategy = "steps"
    cfg.stages = cfg.stages[1:]
    cfg.stages[0].training.update({"eval_steps": 2, "max_steps": 2, "warmup_steps": 0})
    output, logits = run_and_keep_logits(cfg, batch, monkeypatch)
    tensors = load_file(output / "decoder/final" / WEIGHTS)
    for part, rank in zip(("encoder", "decoder"), LORAS[lora], strict=True):
        trained = [t for n, t in tensors.items() if n.startswith(part) and ".lora_B" in n]
        assert bool(trained) == (rank > 0) and all(t.any() for t in trained), part
    torch.save(batch, folder / "batch.pt")
    run_python(
        """
        import sys, torch
        from tiny_audio.asr.asr_modeling import ASRModel
        torch.set_num_threads(int(sys.argv[4]))
        with torch.no_grad():
            logits = ASRModel.from_pretrained(sys.argv[1])(**torch.load(sys.argv[2])).logits
        torch.save(logits, sys.argv[3])
        """,
        output, folder / "batch.pt", folder / "logits.pt", torch.get_num_threads(),
    )  # fmt: skip
    assert torch.equal(torch.load(folder / "logits.pt"), logits)
    cfg.model.pretrained_model_path, cfg.run.output_dir = str(output), str(folder / "next")
    cfg.training.learning_rate = 0.0
    OmegaConf.set_struct(cfg, False)
    cfg.stages[0].training.update(
        {"learning_rate": 1e-12, "decoder_learning_rate": 1e-12, "encoder_learning_rate": 1e-12,
         "max_steps": 1, "eval_steps": 1}
    )  # fmt: skip
    (before,), (after,) = (
        [row["eval_loss"] for row in read_log(run / "decoder" / LOG) if "eval_loss" in row]
        for run in (output, runner.train(cfg))
    )
    assert after == pytest.approx(before, rel=1e-6)  # a step of 1e-12 may turn a last digit


@pytest.mark.parametrize(
    "lora", ["both", *(pytest.param(x, marks=pytest.mark.long) for x in LORAS if x != "both")]
)
def test_lora_combinations_of_tiny_models(compose, corpus, lora, monkeypatch, tmp_path):
    cfg = compose(encoder="hubert", learning_rate=1e-3)
    processor = build_processor(cfg)
    batch = processor([load_audio(str(corpus.parent / f"wav/{i}.wav")) for i in (3, 0)])
    check_combination(cfg, lora, dict(batch), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("lora", list(LORAS))
def test_lora_combinations_of_real_models(
    compose, real_bases, real_clips, lora, monkeypatch, tmp_path
):
    cfg = compose(f"run.output_dir={tmp_path / 'run'}")
    cfg.model.encoder_model_name = str(real_bases.encoder)
    cfg.model.decoder_model_name = str(real_bases.decoder)
    cfg.data.train = [{"path": str(real_bases.dev), "sample": 8}]
    cfg.data.eval = cfg.data.train
    cfg.stages[1].training.batch_seconds = 30
    batch = build_processor(cfg)(real_clips[:2])
    check_combination(cfg, lora, dict(batch), tmp_path, monkeypatch)
