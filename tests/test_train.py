"""Training runs of tiny models, composed from the real configs: they learn, resume and refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_pipeline import FLAGS, ASRPipeline
from tiny_audio.asr.asr_processing import ASRProcessor
from tiny_audio.asr.asr_saving import WEIGHTS
from tiny_audio.training import build, trainer
from tiny_audio.training import train as runner
from tiny_audio.training.manifests import DataError
from tiny_audio.training.recipe import CONFIGS, check_config
from tiny_audio.training.trainer import ASRTrainer, Preempted


class Killed(RuntimeError):
    """Stands for the kill signal."""


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def die_at(monkeypatch, step):
    """Stop the run in the middle of an update, once that many steps are done."""
    original = runner.ASRTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(runner.ASRTrainer, "compute_loss", compute_loss)


def assert_same_tensors(first: Path, second: Path):
    a, b = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert set(a) == set(b)
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, f"{len(differing)} of {len(a)} tensors differ, e.g. {differing[:3]}"


# -- a whole run ---------------------------------------------------------------------------------


def test_a_run_ends_with_a_model_that_transcribes(compose, corpus, capsys):
    cfg = compose()
    output = runner.train(cfg)
    assert output == Path(cfg.run.output_dir)
    printed = capsys.readouterr().out
    for word in ("stage align", "stage decoder", "encoder", "projector", "frozen", "ETA"):
        assert word in printed
    for stage, steps in (("align", 6), ("decoder", 4)):
        rows = log_of(output / stage)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        for row in rows:
            assert row["loss"] > 0
            assert row["audio_seconds_per_second"] > 0
            assert 0 <= row["padding"] < 0.5 and 0 <= row["waiting"] < 1
            assert row["dropped"] == 0
    assert OmegaConf.load(output / "training_config.yaml").peft.r == 16
    pipe = ASRPipeline(
        model=ASRModel.from_pretrained(output), processor=ASRProcessor.from_pretrained(output)
    )
    results = pipe([str(corpus.parent / f"wav/{i}.wav") for i in range(3)])
    assert all(set(result) <= {"text", "warnings", *FLAGS} for result in results)
    assert_same_trained(output, output / "decoder" / "final")
    # The same command again does nothing and says so.
    before = (output / WEIGHTS).stat().st_mtime_ns
    assert runner.train(cfg) == output
    assert "finished" in capsys.readouterr().out
    assert (output / WEIGHTS).stat().st_mtime_ns == before


def assert_same_trained(whole: Path, parts: Path):
    a, b = load_file(whole / WEIGHTS), load_file(parts / WEIGHTS)
    assert set(b) < set(a)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_the_loss_falls(compose, encoder):
    cfg = compose(
        "data.max_train_samples=4", "data.feature_noise=0", "data.channel_drop=0",
        "data.time_mask=0", steps=(30, 50), encoder=encoder, learning_rate=3e-3,
    )  # fmt: skip
    cfg.stages[1].training.decoder_learning_rate = 1e-2
    output = runner.train(cfg)
    for stage in ("align", "decoder"):
        losses = [row["loss"] for row in log_of(output / stage)]
        first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        assert last < 0.8 * first, f"{stage}: {first:.2f} -> {last:.2f}"


def test_the_second_stage_starts_where_the_first_ended(compose, monkeypatch):
    cfg = compose(steps=(4, 1))
    cfg.stages[1].training.learning_rate = 1e-12
    cfg.stages[1].training.decoder_learning_rate = 1e-12
    output = runner.train(cfg)
    first, second = (load_file(output / s / "final" / WEIGHTS) for s in ("align", "decoder"))
    for name in ("projector.output_norm.weight", "ctc.blank.weight", "residual.weight"):
        assert torch.allclose(first[name], second[name], atol=1e-9), name


def test_a_stage_trains_only_what_it_is_told(compose):
    output = runner.train(compose(steps=(2, 2)))
    first, second = (load_file(output / s / "final" / WEIGHTS) for s in ("align", "decoder"))
    lora = [name for name in first if ".lora_B" in name]
    assert lora
    assert all(not first[name].any() for name in lora)  # decoder_learning_rate: 0
    assert all(second[name].any() for name in lora)


# -- stopping and continuing ---------------------------------------------------------------------

# Everything random is switched on, and every checkpoint lies in the middle of an epoch.
LIVELY = ("data.feature_noise=0.1", "data.channel_drop=0.1", "data.time_mask=4")
RESUMED = {"steps": (12, 5), "save_steps": 4, "ctc_negatives": 8, "batch_seconds": 4.5}


@pytest.fixture(scope="module")
def uninterrupted(compose_in, tmp_path_factory):
    """The run that the interrupted ones must equal."""
    return runner.train(compose_in(tmp_path_factory.mktemp("whole"), *LIVELY, **RESUMED))


def test_a_stopped_run_continues_bit_for_bit(compose, monkeypatch, uninterrupted):
    cfg = compose(*LIVELY, **RESUMED)
    output = Path(cfg.run.output_dir)
    epochs = []
    for step in (2, 6, 10):  # before the first checkpoint, then after one and after two
        with monkeypatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(Killed):
                runner.train(cfg)
        assert not (output / runner.FINISHED).exists()
        for state in (output / "align").glob("checkpoint-*/trainer_state.json"):
            epochs.append(json.loads(state.read_text())["epoch"])
    assert max(epochs) > 1, "no checkpoint after the first epoch: this test shows too little"
    assert all(epoch % 1 for epoch in epochs), "a checkpoint lies at the end of an epoch"
    runner.train(cfg)
    for stage in ("align", "decoder"):
        assert_same_tensors(output / stage / "final", uninterrupted / stage / "final")
    wanted = {row["step"]: row["loss"] for row in log_of(uninterrupted / "align")}
    assert {row["step"]: row["loss"] for row in log_of(output / "align")} == wanted


@pytest.mark.parametrize("left", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 3, 4))])
def test_a_checkpoint_that_was_cut_short_is_passed_over(compose, monkeypatch, uninterrupted, left):
    """The process died while it wrote its second checkpoint: the first one is still good."""
    cfg = compose(*LIVELY, **RESUMED)
    folder = Path(cfg.run.output_dir) / "align"
    with monkeypatch.context() as patch:
        die_at(patch, 6)
        with pytest.raises(Killed):
            runner.train(cfg)
    files = sorted((folder / "checkpoint-4").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    (folder / "checkpoint-8").mkdir()
    files = files[: len(files) * left // 4]
    for path in files:
        shutil.copy(path, folder / "checkpoint-8" / path.name)
    last = folder / "checkpoint-8" / files[-1].name
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    runner.train(cfg)
    assert_same_tensors(folder / "final", uninterrupted / "align" / "final")


def test_fresh_starts_anew(compose, monkeypatch):
    cfg = compose("run.fresh=true", steps=(3, 1), save_steps=1)
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(Killed):
            runner.train(cfg)
    output = runner.train(cfg)
    assert [row["step"] for row in log_of(output / "align")] == [1, 2, 3]


def test_a_run_that_goes_on_with_other_settings_names_them(compose, monkeypatch, capsys):
    """Each time, against those it was begun with: the right ones again are not other ones."""
    settings = {"steps": (3, 1), "save_steps": 1}
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        for _ in range(2):
            with pytest.raises(Killed):
                runner.train(compose("+training.adam_epsilon=1e-6", **settings))
        assert "warning" not in capsys.readouterr().out
        other = compose("run.seed=7", "run.price_per_hour=2", **settings, learning_rate=0.5)
        for _ in range(2):
            with pytest.raises(Killed):
                runner.train(other)
            said = capsys.readouterr().out
            assert "align was begun with other settings" in said
            assert sorted(re.findall(r"[\w.]+: [\w.-]+ -> [\w.-]+", said)) == [
                "run.seed: 0 -> 7",
                "training.adam_epsilon: 1e-06 -> None",
                "training.learning_rate: 0.002 -> 0.5",
            ]
    runner.train(compose("+training.adam_epsilon=1e-6", **settings))
    assert "warning" not in capsys.readouterr().out


def test_the_recipe_decides_how_often_a_continued_run_saves(compose, tmp_path):
    """A checkpoint restores the intervals that it was saved with, too."""
    runner.train(compose("training.save_total_limit=9", steps=(4, 1), save_steps=4))
    shutil.rmtree(tmp_path / "run/align/final")
    (tmp_path / "run/finished.json").unlink()
    runner.train(compose("training.save_total_limit=9", steps=(6, 1), save_steps=1))
    saved = {path.name for path in (tmp_path / "run/align").glob("checkpoint-*")}
    assert saved == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}


def test_fresh_deletes_a_run_and_nothing_else(compose, tmp_path):
    (tmp_path / "run/years of work").mkdir(parents=True)
    with pytest.raises(ValueError, match="it is not a run of this recipe"):
        runner.train(compose("run.fresh=true"))
    assert (tmp_path / "run/years of work").exists()
    start = tmp_path / "run/align/final"  # of what it is to start from
    start.mkdir(parents=True)
    (start / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="pretrained_model_path is inside"):
        runner.train(compose("run.fresh=true", f"model.pretrained_model_path={start}"))
    assert start.exists()


def test_fresh_keeps_the_old_run_where_the_data_cannot_be_found(compose, tmp_path):
    output = runner.train(compose(steps=(1, 1)))
    cfg = compose("run.fresh=true", steps=(1, 1))
    cfg.data.train[0].path = str(tmp_path / "mistyped.jsonl")
    with pytest.raises(DataError, match=r"mistyped\.jsonl: no such file"):
        runner.train(cfg)
    assert (output / runner.FINISHED).exists()


def test_a_finished_run_names_the_settings_that_differ(compose, capsys):
    runner.train(compose(steps=(1, 1)))
    runner.train(compose(steps=(1, 1)))
    assert "other settings" not in capsys.readouterr().out
    runner.train(compose("peft.r=4", steps=(1, 1)))
    assert "other settings (peft.r: 16 -> 4)" in capsys.readouterr().out


def test_a_setting_that_names_the_environment_does_not_differ(compose, capsys, monkeypatch):
    monkeypatch.setenv("CLIP_LIMIT", "100")
    for _ in range(2):
        cfg = compose(steps=(1, 1))
        cfg.data.max_train_samples = "${oc.decode:${oc.env:CLIP_LIMIT}}"
        runner.train(cfg)
    said = capsys.readouterr().out
    assert "is finished" in said and "other settings" not in said


def test_the_weights_of_decoding_are_those_of_the_start(compose):
    first = runner.train(compose(steps=(1, 1)))
    config = json.loads((first / "config.json").read_text())
    config["decoding"] |= {"prior": 0.2, "language_model": 1.5}
    (first / "config.json").write_text(json.dumps(config))
    start = f"model.pretrained_model_path={first}"
    for more, expected in (([], 0.2), (["model.decoding={prior: 0.3}"], 0.3)):
        again = runner.train(compose(start, *more, steps=(1, 1), output=f"next{expected}"))
        assert json.loads((again / "config.json").read_text())["decoding"]["prior"] == expected


def test_mended_data_is_trained_on(compose, corpus, tmp_path):
    """What was dropped in a run that ended with an error is not held against the next one."""
    folder = tmp_path / "holes"
    shutil.copytree(corpus.parent, folder)
    manifest = folder / "train.jsonl"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"text": "', '"text": "", "was": "', 3))
    cfg = compose("data.max_dropped_fraction=0.1", manifest=manifest)
    with pytest.raises(DataError, match="3 of 12 examples were dropped"):
        runner.train(cfg)
    manifest.write_text(whole)
    output = runner.train(cfg)
    assert log_of(output / "align")[-1]["dropped"] == 0


@pytest.mark.long
def test_what_was_dropped_after_the_checkpoint_is_dropped_again(compose, corpus, monkeypatch,
                                                                tmp_path):  # fmt: skip
    """A stream counts from the checkpoint on, as the examples that it has seen."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row in rows:
        row["audio"] = str(corpus.parent / row["audio"])
    rows = [{**row, "id": f"{i}-{row['id']}"} for i in range(12) for row in rows]
    rows = [{**row, "text": ""} if i % 8 == 0 else row for i, row in enumerate(rows)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(output):
        return compose("data.streaming=true", "data.max_seconds=5.8", "data.block=20",
                       "training.cache_encoder=false", "data.max_dropped_fraction=0.2",
                       steps=(36, 1), save_steps=18, manifest=manifest, output=output)  # fmt: skip

    whole = runner.train(run("whole")) / "align"
    for step in (28, 32):
        with monkeypatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(Killed):
                runner.train(run("broken"))
    broken = runner.train(run("broken")) / "align"
    assert (whole / "dropped.jsonl").read_text() == (broken / "dropped.jsonl").read_text()
    assert [r["dropped"] for r in log_of(whole)] == [r["dropped"] for r in log_of(broken)]
    assert log_of(whole)[-1]["dropped"] > 5


def test_a_signal_in_the_last_step_of_a_stage_stops_the_run(compose, monkeypatch, tmp_path):
    """Within its evaluation, too: the next stage may take a day."""
    cfg = compose("training.eval_strategy=steps", eval_steps=3, steps=(3, 1))
    with monkeypatch.context() as patch:
        evaluate = ASRTrainer.evaluate

        def taken_away(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, *args, **kwargs)

        patch.setattr(ASRTrainer, "evaluate", taken_away)
        with pytest.raises(Preempted, match="SIGTERM: saved"):
            runner.train(cfg)
    assert not (tmp_path / "run/decoder").exists()
    output = runner.train(cfg)
    assert [row["step"] for row in log_of(output / "align") if "loss" in row] == [1, 2, 3]
    one, other = (load_file(output / f"align/{x}/{WEIGHTS}") for x in ("checkpoint-3", "final"))
    assert all(torch.equal(one[name], other[name]) for name in one)  # no step too many


def test_a_signal_keeps_the_newest_checkpoint_beside_the_best(compose, monkeypatch, tmp_path):
    """Trainer would keep only the best one if the recipe keeps one."""
    cfg = compose("training.eval_strategy=steps", "training.save_total_limit=1", eval_steps=2,
                  save_steps=2, steps=(9, 1))  # fmt: skip
    loss = ASRTrainer.compute_loss

    def taken_away(self, *args, **kwargs):
        if self.state.global_step == 6 and self.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(ASRTrainer, "compute_loss", taken_away)
    monkeypatch.setattr(trainer, "score", lambda *_: {"wer": 50.0})  # the first is the best
    with pytest.raises(Preempted, match="SIGTERM: saved"):
        runner.train(cfg)
    found = {path.name for path in (tmp_path / "run/align").glob("checkpoint-*")}
    assert found == {"checkpoint-2", "checkpoint-7"}


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+training.lerning_rate=1", "did you mean 'learning_rate'"),
        ("+training.auto_find_batch_size=true", "unknown key 'auto_find_batch_size'"),
        ("+training.batch_second=1", "did you mean 'batch_seconds'"),
        ("+data.minseconds=1", "did you mean 'min_seconds'"),
        ("+model.stak=1", "did you mean 'stack'"),
        ("+encoder_lora.rank=1", "unknown key 'rank' in encoder_lora"),
        ("+peft.alpha=1", "did you mean 'lora_alpha'"),
        ("+run.output=1", "did you mean 'output_dir'"),
        ("+foo=1", "unknown key 'foo'"),
        ("+modle.stack=1", "did you mean 'model'"),
    ],
)
def test_unknown_keys_are_refused(compose, override, message):
    with pytest.raises(ValueError, match=message):
        runner.train(compose(override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.resume_from_checkpoint=x", "the run has several stages"),
        ("+training.seed=1", "unknown key 'seed' in training"),
        ("+training.hub_private_repo=true", "unknown key 'hub_private_repo'"),
    ],
)
def test_what_cannot_be_meant_is_refused(compose, override, message):
    with pytest.raises(ValueError, match=message):
        runner.train(compose(override))


def test_unknown_keys_of_a_stage_are_refused(compose):
    for where, message in (("training", "learning_rate"), ("data", "max_seconds")):
        cfg = OmegaConf.to_container(compose())
        cfg["stages"][0].setdefault(where, {})[message[:-3] + "e"] = 1
        with pytest.raises(ValueError, match=f"did you mean '{message}'"):
            runner.train(OmegaConf.create(cfg))


@pytest.mark.parametrize("name", ["config", "+experiments=quickstart"])
def test_the_shipped_configs_are_accepted(name):
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = hydra.compose("config", [] if name == "config" else [name])
    check_config(cfg)


def test_a_loss_that_is_not_finite_names_its_clips(compose, monkeypatch):
    build_model = build.build_model

    def broken(*args, **kwargs):
        model = build_model(*args, **kwargs)
        with torch.no_grad():
            model.projector.down_proj.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(build, "build_model", broken)
    cfg = compose()
    with pytest.raises(
        DataError, match=r"the loss is nan at step 0; the weights were not updated. Clips .*clip\d"
    ):
        runner.train(cfg)
    assert not (Path(cfg.run.output_dir) / runner.FINISHED).exists()


def test_broken_clips_are_counted_and_end_the_run_when_too_many(compose, corpus, tmp_path):
    folder = tmp_path / "holes"
    shutil.copytree(corpus.parent, folder)
    (folder / "wav/3.wav").write_text("no audio")
    cfg = compose("data.max_dropped_fraction=0.1", manifest=folder / "train.jsonl")
    output = runner.train(cfg)
    rows = [json.loads(line) for line in (output / "align/dropped.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reason"]) for row in rows] == [("clip3", "unreadable audio")]
    assert log_of(output / "align")[-1]["dropped"] == 1
    (folder / "wav/4.wav").unlink()
    cfg = compose("data.max_dropped_fraction=0.1", manifest=folder / "train.jsonl", output="second")
    with pytest.raises(DataError, match="2 of 12 examples were dropped"):
        runner.train(cfg)


# -- overrides have an effect --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "part", "rank"),
    [("peft.r=3", "decoder", 3), ("encoder_lora.r=2", "encoder", 2), ("peft.r=0", "decoder", 0)],
)  # fmt: skip
def test_lora_overrides_reach_the_model(compose, override, part, rank):
    output = runner.train(compose(override, "training.cache_encoder=false", steps=(1, 1)))
    shapes = [
        tensor.shape[0]
        for name, tensor in load_file(output / "decoder/final" / WEIGHTS).items()
        if name.startswith(part + ".") and ".lora_A" in name
    ]
    assert set(shapes) == ({rank} if rank else set())


def test_a_cpu_trains_in_bfloat16_if_it_can(compose, capsys):
    cpu = torch.cpu.get_capabilities()
    losses = {}
    for bf16 in (False, True):
        folder = runner.train(compose(f"training.bf16={bf16}", output=f"bf16-{bf16}"))
        rows = log_of(folder / "align") + log_of(folder / "decoder")
        losses[bf16] = [row["loss"] for row in rows if "loss" in row]
        weights = load_file(folder / WEIGHTS)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.03)
    if cpu.get("avx512_bf16") or cpu.get("amx_bf16"):
        assert losses[True] != losses[False]
    else:
        assert "training.bf16=True is off: this device does not have it" in capsys.readouterr().out


def test_encoder_lora_and_a_cache_of_its_frames_exclude_each_other(compose):
    with pytest.raises(
        ValueError, match=r"cache_encoder needs a frozen encoder.*encoder_lora\.r=0"
    ):
        runner.train(compose("encoder_lora.r=2"))
    runner.train(compose("encoder_lora.r=2", "training.encoder_learning_rate=0", steps=(1, 1)))


def test_a_stage_can_end_between_its_start_and_its_end(compose):
    runs = {}
    for share in (0.0, 0.25):
        cfg = compose(output=f"run{share}", steps=(4, 4))
        OmegaConf.update(cfg.stages[1].training, "start_share", share, force_add=True)
        runs[share] = runner.train(cfg) / "decoder/final" / WEIGHTS
    end, between = (load_file(path) for path in runs.values())
    start = load_file(runs[0.0].parents[2] / "align/final" / WEIGHTS)
    for name, tensor in between.items():
        wanted = end[name]
        if name in start:
            wanted = torch.lerp(end[name], start[name], 0.25)
        elif ".lora_B" in name:  # a new LoRA started at zero
            assert tensor.any()
            wanted = 0.75 * end[name]
        assert torch.allclose(tensor, wanted, atol=1e-7), name


def test_a_share_of_the_start_needs_a_start(compose):
    with pytest.raises(ValueError, match="start_share averages with"):
        runner.train(compose("training.start_share=0.5"))


def test_a_trained_model_is_continued_where_it_stopped(compose, tmp_path):
    first = runner.train(compose(steps=(8, 8)))
    cfg = compose(
        f"model.pretrained_model_path={first / 'decoder' / 'final'}", steps=(1, 1), output="next",
        learning_rate=1e-12,
    )  # fmt: skip
    cfg.stages[1].training.decoder_learning_rate = 1e-12
    second = runner.train(cfg)
    assert_close(first / "decoder" / "final", second / "decoder" / "final")


def test_a_finished_model_is_continued_where_it_stopped(compose, tmp_path):
    """From the folder that `train` names at its end, which carries the base models too."""
    first = runner.train(compose(steps=(4, 4)))
    cfg = compose(f"model.pretrained_model_path={first}", steps=(1, 1), output="next",
                  learning_rate=1e-12)  # fmt: skip
    cfg.stages[1].training.decoder_learning_rate = 1e-12
    second = runner.train(cfg)
    assert_close(first / "decoder" / "final", second / "decoder" / "final")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_letters_that_a_trained_model_lacks_are_added(compose, corpus, tmp_path, capsys, share):
    first = runner.train(compose(steps=(4, 4)))
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    foreign = corpus.with_name("foreign.jsonl")
    for row in rows[:5]:
        row["text"] += " žába"
    foreign.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = compose(
        f"model.pretrained_model_path={first}", f"training.start_share={share}", manifest=foreign,
        steps=(1, 1), output="next", learning_rate=1e-12,
    )  # fmt: skip
    second = runner.train(cfg)
    assert "new letters, which the model will learn: ž (5x), á (5x)" in capsys.readouterr().out
    old, new = ASRModel.from_pretrained(first), ASRModel.from_pretrained(second)
    known = len(old.config.ctc_alphabet)
    assert new.config.ctc_alphabet[:known] == old.config.ctc_alphabet
    assert set("žá".encode()) <= {*new.config.ctc_alphabet[known:]}
    was, now = old.characters.output.weight, new.characters.output.weight
    assert torch.allclose(was, now[: known + 1], atol=1e-6)
    assert ASRProcessor.from_pretrained(second).spell("žába") != []
    assert {*old.config.ctc_token_ids} < {*new.config.ctc_token_ids}


def assert_close(first: Path, second: Path):
    a, b = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert set(a) == set(b)
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-6), name


def test_the_encoder_cache_is_not_reused_for_other_data(compose, corpus, tmp_path):
    """The same folder with other data: every clip must be trained on."""
    lines = corpus.read_text().splitlines()
    few = corpus.parent / "few.jsonl"
    few.write_text("\n".join(lines[:5]) + "\n")
    runner.train(compose(steps=(1, 1), manifest=few))
    shutil.rmtree(tmp_path / "run" / "decoder")
    shutil.rmtree(tmp_path / "run" / "align")
    (tmp_path / "run" / runner.FINISHED).unlink()
    output = runner.train(compose(steps=(1, 1)))
    caches = [list(path.iterdir()) for path in output.glob("encoder_frames*")]
    assert max(map(len, caches)) == 12


def one_step(tiny_bases, corpus, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run `python src/train.py` for one step in a process without a terminal."""
    command = [
        sys.executable,
        str(CONFIGS.parents[3] / "src" / "train.py"),
        "+experiments=quickstart",
        f"model.encoder_model_name={tiny_bases / 'whisper'}",
        f"model.decoder_model_name={tiny_bases / 'decoder'}",
        f"data.train=[{{path: {corpus}}}]",
        f"run.output_dir={folder / 'run'}",
        "stages=[{name: only, training: {learning_rate: 2e-3, max_steps: 1, batch_seconds: 8}}]",
        "training.dataloader_num_workers=0",
        "training.logging_steps=1",
        "training.warmup_steps=0",
        *overrides,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


def test_an_override_that_a_stage_shadows_is_not_ignored_in_silence(tiny_bases, corpus, tmp_path):
    """`+experiments=quickstart training.learning_rate=1e-3` is the example of train.py's own text,
    and its stages set `learning_rate` themselves: the override must win, or be refused by name."""
    rate = 7.77e-5
    out = one_step(tiny_bases, corpus, tmp_path, f"training.learning_rate={rate}")
    if out.returncode:
        assert "learning_rate" in out.stderr, out.stderr[-500:]
        assert "Traceback" not in out.stderr
    else:
        assert log_of(tmp_path / "run" / "only")[0]["learning_rate"] == pytest.approx(rate)


def test_a_log_has_lines_and_no_bars(tiny_bases, corpus, tmp_path):
    """Where no terminal shows a bar, each redraw of it would be a line of the log."""
    out = one_step(tiny_bases, corpus, tmp_path, "data.eval=[]", "training.eval_strategy=no",
                   "training.load_best_model_at_end=false", "model.tune=false")  # fmt: skip
    assert out.returncode == 0 and log_of(tmp_path / "run" / "only")
    assert not re.search(r"%\||Loading weights|new PAD/BOS/EOS", out.stderr), out.stderr[-1000:]


def test_broken_clips_still_count_when_a_stopped_run_continues(
    compose, corpus, tmp_path, monkeypatch
):
    """Their absence from the cache of encoder frames must not hide them."""
    folder = tmp_path / "holes"
    shutil.copytree(corpus.parent, folder)
    for i in range(4):
        (folder / f"wav/{i}.wav").write_text("no audio")
    cfg = compose("data.max_dropped_fraction=0.1", manifest=folder / "train.jsonl")
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises((Killed, DataError)):
            runner.train(cfg)
    with pytest.raises(DataError, match="4 of 12 examples were dropped"):
        runner.train(cfg)
