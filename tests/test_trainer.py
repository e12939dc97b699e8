"""Evaluation during training, the best model, the log, its curves and trackers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from conftest import write_manifest
from safetensors.torch import load_file

from tiny_audio.asr.asr_audio import load_audio
from tiny_audio.asr.asr_config import IGNORE
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_pipeline import ASRPipeline
from tiny_audio.asr.asr_processing import ASRProcessor
from tiny_audio.asr.asr_saving import WEIGHTS
from tiny_audio.errors import clean_exit
from tiny_audio.evaluation.scoring import score
from tiny_audio.training import train as runner
from tiny_audio.training.checks import read_log
from tiny_audio.training.recipe import CONFIGS, compose_recipe
from tiny_audio.training.run_log import LOG, StepLine

EVALUATED = ("training.eval_strategy=steps",)


def rows_of(folder: Path, key: str) -> list[dict]:
    return [row for row in read_log(folder / LOG) if key in row]


@pytest.fixture(scope="module")
def evaluated(compose_in, corpus, tmp_path_factory):
    """A run that evaluated as it went, on every clip of the corpus.

    Scored as Dutch, with an "um" in each text, which only the English normaliser takes out.
    """
    folder = tmp_path_factory.mktemp("evaluated")
    clips = [json.loads(line) for line in corpus.read_text().splitlines()]
    for clip in clips:
        clip |= {"audio": str(corpus.parent / clip["audio"]), "text": f"um {clip['text']}"}
    cfg = compose_in(
        folder, *EVALUATED, steps=(6, 4), eval_steps=2, save_steps=2, save_total_limit=10,
        ctc_negatives=8, language="nl",
    )  # fmt: skip
    cfg.data.eval = [{"path": str(write_manifest(folder / "eval.jsonl", clips))}]
    return cfg, runner.train(cfg)


def test_evaluation_leaves_the_training_as_it_is(compose, evaluated):
    _, output = evaluated
    plain = runner.train(compose(steps=(6, 4), save_steps=2, ctc_negatives=8))
    for stage in ("align", "decoder"):
        assert [r["loss"] for r in rows_of(output / stage, "loss")] == [
            r["loss"] for r in rows_of(plain / stage, "loss")
        ]
        a, b = (load_file(run / stage / "final" / WEIGHTS) for run in (output, plain))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["align", "decoder"])
def test_evaluation_says_what_the_checkpoint_gives(evaluated, stage):
    """Loss and WER of each checkpoint, computed here one clip at a time, from the folder."""
    cfg, output = evaluated
    training = next(s for s in cfg.stages if s.name == stage).training
    clips = [json.loads(line) for line in Path(cfg.data.eval[0].path).read_text().splitlines()]
    logged = rows_of(output / stage, "eval_loss")
    assert [row["step"] for row in logged] == [2, 4, 6][: len(logged)] and len(logged) >= 2
    for row in logged:
        folder = output / stage / f"checkpoint-{row['step']}"
        model, processor = ASRModel.from_pretrained(folder), ASRProcessor.from_pretrained(folder)
        loss, labels, said, heard = 0.0, 0, [], []
        for clip in clips:
            features = processor.features(load_audio(clip["audio"]))
            target, spelled = processor.tokenize(clip["text"]), processor.spell(clip["text"])
            batch = processor.collate([features], [target], [spelled])
            keys = ("decoder_loss_weight", "ctc_loss_weight", "character_loss_weight")
            n = int((batch["labels"] != IGNORE).sum())
            with torch.no_grad():
                loss += n * float(model(**batch, **{key: training[key] for key in keys}).loss)
            labels += n
            pipe = ASRPipeline(model=model, processor=processor)
            decode = "ctc" if stage == "align" else "rescore"
            heard.append(pipe(clip["audio"], decode=decode)["text"])
            said.append(clip["text"])
        assert row["eval_loss"] == pytest.approx(loss / labels, rel=1e-4)
        assert row["eval_wer"] == pytest.approx(score(said, heard, "nl")["wer"])
        assert row["eval_wer"] != pytest.approx(score(said, heard)["wer"])
        assert row["eval_clips"] == len(clips) == 12


def test_the_best_checkpoint_is_kept_and_a_run_that_gets_worse_stops(compose):
    """A rate that ruins the model: the first evaluation stays the best one."""
    cfg = compose(
        *EVALUATED, "training.metric_for_best_model=loss", "training.load_best_model_at_end=true",
        "training.early_stopping_patience=2", "stages=[{name: only, training: {}}]", steps=(40,),
        eval_steps=2, save_steps=2, learning_rate=0.3, decoder_loss_weight=0, save_total_limit=50,
    )  # fmt: skip
    output = runner.train(cfg)
    losses = [row["eval_loss"] for row in rows_of(output / "only", "eval_loss")]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 20
    state = json.loads(
        (output / f"only/checkpoint-{2 * len(losses)}/trainer_state.json").read_text()
    )
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{2 * (best + 1)}"
    wanted = load_file(output / "only" / f"checkpoint-{2 * (best + 1)}" / WEIGHTS)
    final = load_file(output / WEIGHTS)
    assert all(torch.equal(final[name], tensor) for name, tensor in wanted.items())


def test_no_evaluation_clips_is_an_error(compose):
    cfg = compose(*EVALUATED)
    cfg.data.eval = None
    with pytest.raises(ValueError, match=r"data\.eval names no clips.*eval_strategy=no"):
        runner.train(cfg)


def test_the_curves_are_a_picture(evaluated):
    _, output = evaluated
    with av.open(str(output / "curves.png")) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="gray")
    assert picture.shape[1] > 800
    assert 0.5 < (picture > 240).mean() < 0.99  # lines on white


def test_the_log_has_each_step_once_after_a_stop(compose, monkeypatch):
    cfg = compose("run.price_per_hour=2", steps=(6, 1), save_steps=2)
    with monkeypatch.context() as patch:
        original = runner.ASRTrainer.compute_loss

        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        patch.setattr(runner.ASRTrainer, "compute_loss", compute_loss)
        with pytest.raises(KeyboardInterrupt):
            runner.train(cfg)
    before = rows_of(Path(cfg.run.output_dir) / "align", "loss")
    assert [row["step"] for row in before] == [1, 2, 3, 4, 5]
    output = runner.train(cfg)
    rows = rows_of(output / "align", "loss")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[3] == before[3]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)  # the clock goes on where it stopped


def test_the_price_is_said(compose, capsys):
    runner.train(compose("run.price_per_hour=3600", steps=(3, 1)))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("step     3/3"))
    said = line.split("cost ")[1].split(" of ")
    assert 0 < float(said[0]) <= float(said[1]) < 600


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture
def overrides(tiny_bases, corpus, tmp_path) -> list[str]:
    """Of a run of two steps."""
    return [
        f"model.encoder_model_name={tiny_bases / 'whisper'}",
        f"model.decoder_model_name={tiny_bases / 'decoder'}",
        "model.projector_hidden=32",
        f"data.train=[{{path: {corpus}}}]",
        f"data.eval=[{{path: {corpus}, sample: 2}}]",
        f"run.output_dir={tmp_path / 'run'}",
        "training.max_steps=2",
        "training.eval_steps=1",
        "training.logging_steps=1",
        "training.warmup_steps=0",
        "training.dataloader_num_workers=0",
    ]


@pytest.fixture
def command(overrides, tmp_path):
    """`command("training.x=1", WANDB_MODE="offline")`: src/train.py in a process of its own."""

    def run(*more: str, **environment: str) -> subprocess.CompletedProcess:
        script = str(CONFIGS.parents[3] / "src" / "train.py")
        parts = [sys.executable, script, *overrides, *more]
        environment = {
            "WANDB_API_KEY": "",
            "HOME": str(tmp_path),
            "WANDB_SILENT": "true",
        } | environment
        return subprocess.run(
            parts, capture_output=True, text=True, cwd=tmp_path, timeout=240,
            env={**os.environ, **environment},
        )  # fmt: skip

    return run


@pytest.mark.long
def test_wandb_offline_is_really_written(command, tmp_path):
    done = command(WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    written = record.read_bytes()
    for key in (b"eval/wer", b"train/loss", b"train/audio_seconds_per_second", b"encoder_lora"):
        assert key in written, key


def test_every_stage_is_tracked(tmp_path):
    """Each in a run of its own: the run of the stage before is finished first."""
    code = """
import pathlib, sys
from tiny_audio.training.run_log import start_trackers
for stage in ("align", "decoder"):
    folder = pathlib.Path(sys.argv[1], stage)
    folder.mkdir()
    assert start_trackers(None, folder, {}) == ["wandb"]
"""
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.parametrize(("device", "warned"), [("cuda", True), ("cpu", False)])
def test_a_gpu_that_waited_for_data_is_named(device, warned, tmp_path, capsys):
    rows = [{"step": i, "loss": 1.0, "seconds": i, "waiting": w} for i, w in ((1, 0.3), (2, 0.01))]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / LOG).write_text("".join(json.dumps(row) + "\n" for row in rows))
    args, state = SimpleNamespace(device=torch.device(device)), SimpleNamespace()
    state.is_world_process_zero = True
    StepLine(tmp_path / "train", ["train"], None).on_train_end(args, state, None)
    said = capsys.readouterr().out
    assert ("in 1 of 2 log lines the GPU waited for data" in said) == warned


def test_without_a_key_the_run_goes_on_and_says_so(command, tmp_path):
    done = command()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wandb has no key" in done.stdout
    assert not (tmp_path / "run" / "wandb").exists()
    assert len(rows_of(tmp_path / "run" / "train", "eval_wer")) == 2
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.long
def test_without_a_network_the_run_goes_on_and_says_so(command, tmp_path):
    key = "x" * 40
    done = command(WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wandb cannot be reached" in done.stdout
    assert key not in done.stdout + done.stderr
    assert len(rows_of(tmp_path / "run" / "train", "loss")) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "did you mean 'learning_rate'"),
        ("modle.stack=1", "did you mean 'model'"),
        (
            "model.encoder_model_name=openai/whisper-tny",
            "model.encoder_model_name=openai/whisper-t",
        ),
        ("model.decoder_model_name=/no/folder", "model.decoder_model_name=/no/folder"),
        ("model.end_token=nothing", "end_token 'nothing'"),
        ("peft.target_modules=[q_prj]", "target 'q_prj' matches no module of the decoder"),
        ("model.pretrained_model_path=/no/model", "/no/model"),
        ("training.resume_from_checkpoint=/no/checkpoint", "/no/checkpoint"),
        ("training.push_to_hub=true", "set HF_TOKEN, or run `hf auth login`"),
        ("training.load_best_model_at_end=true training.eval_steps=7", "load_best_model_at_end"),
        ("training.dtype=bf16", "training.dtype=bf16: not float32"),
        ("training.early_stopping_patience=2", "needs training.load_best_model_at_end=true"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(overrides, override, message, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(SystemExit) as stopped, clean_exit():
        runner.train(compose_recipe([*overrides, *override.split()]))
    (line,) = str(stopped.value).splitlines()
    assert line.startswith("error: ") and message in line


def test_an_error_of_the_command_is_its_last_line(command):
    done = command("training.lerning_rate=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "did you mean 'learning_rate'" in done.stderr.strip().splitlines()[-1]
