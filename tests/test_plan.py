"""What a step is said to cost, against published sizes and against counted real steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import babble
from test_recipes import composed, config_of
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tiny_audio.commands import cli
from tiny_audio.commands.plan import main, utilisation
from tiny_audio.training import plan
from tiny_audio.training.trainer import LOSS_KEYS

ROOT = Path(__file__).parents[1]
FUSED_ATTENTION = {  # torch has no formula for a CPU's fused attention; shapes of q, k and v
    plan.FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    plan.FUSED_BACKWARD: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v),
}
BIG = {
    "facebook/hubert-xlarge-ls960-ft": "hubert-xlarge-ls960-ft.json",
    "HuggingFaceTB/SmolLM3-3B": "SmolLM3-3B.json",
}
SETTINGS = {
    "decoder_loss_weight": 1.0,
    "ctc_loss_weight": 0.2,
    "ctc_negatives": 0,
    "character_loss_weight": 0.2,
    "cache_encoder": False,
    "gradient_checkpointing": False,
    "bf16": False,
}


def big(*overrides: str, **heads):
    """HuBERT-XLarge and SmolLM3-3B without weights, and the settings of the recipe."""
    cfg = composed("+experiments=stage1", *overrides)
    return plan.without_weights(config_of(cfg, **heads), torch.bfloat16), cfg.training


@pytest.mark.parametrize(
    ("overrides", "gflop"),  # of the decoder's path, counted independently: LoRA on both ends,
    [  # frozen encoder, cached frames; 8.4 s clips with 3 tokens a second
        # Then the feature extractor asked for gradients that nothing used: 4.9 for the inputs of
        # its convolutions, 1.3 for the one of positions, 0.5 for layer 0's q, k, v and 0.1 for the
        # projection before them.
        ([], 403 - 6.8),
        (["encoder_lora.r=0"], 290),
        (["encoder_lora.r=0", "training.cache_encoder=true"], 184),
    ],
)
def test_the_big_recipe_costs_what_was_counted_before(overrides, gflop):
    model, settings = big(*overrides, "training.gradient_checkpointing=false")
    cost = plan.count(model, settings, seconds=8.4, tokens=25)
    assert sum(cost.gflop.values()) == pytest.approx(gflop, rel=0.02)
    assert cost.gflop["ctc heads"] == 0  # this model has none
    assert (cost.gflop["encoder"] == 0) == ("training.cache_encoder=true" in overrides)


def real_step(
    monkeypatch, model, processor, settings, clips=3, seconds=2.0, text="the cat sat on a red mat"
):
    """Loss of a real batch of equal clips, and the arguments of `plan.count` that describe it."""
    batch = processor([babble(seconds, i) for i in range(clips)], [text] * clips)
    tokens = len(processor.tokenize(text))
    prompt = len(processor.prefix_ids), len(processor.suffix_ids)
    monkeypatch.setattr(plan, "PROMPT_TOKENS", prompt)
    weights = {key: settings[key] for key in LOSS_KEYS}
    described = {"seconds": seconds, "tokens": tokens, "clips": clips}
    return (lambda: model(**batch, **weights).loss), described


def prepare(model, settings):
    """Training mode, as the settings say, without what is left to chance."""
    model.train()
    for key, off in (("layerdrop", 0.0), ("apply_spec_augment", False)):  # chance
        if hasattr(model.encoder.config, key):
            setattr(model.encoder.config, key, off)
    if settings["gradient_checkpointing"]:
        model.activation_checkpointing_enable()


@pytest.mark.parametrize(
    ("encoder", "lora", "changes"),
    [
        ("whisper", "both", {}),
        ("whisper", "neither", {}),
        ("hubert", "both", {}),
        ("hubert", "encoder", {"ctc_loss_weight": 0.0}),
        ("hubert", "both", {"gradient_checkpointing": True}),
        ("parakeet", "both", {}),
        ("whisper", "decoder", {"decoder_loss_weight": 0.0}),
    ],
)
def test_the_flops_are_those_of_a_real_step(build, encoder, lora, changes, monkeypatch):
    processor, model = build(encoder, lora=lora)
    settings = SETTINGS | changes
    model.encoder.config._attn_implementation = "eager"
    prepare(model, settings)
    loss, described = real_step(monkeypatch, model, processor, settings)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter:
        loss().backward()
    cost = plan.count(plan.meta_copy(model), settings, **described)
    audio = described["seconds"] * described["clips"]
    ratio = sum(cost.gflop.values()) * audio * 1e9 / counter.get_total_flops()
    # With LoRA on q and k alone, the first layer's values need no gradient; a fused kernel, as a
    # GPU runs it and the plan counts it, computes that all the same.
    assert ratio == pytest.approx(1, abs=0.02 if lora in ("both", "encoder") else 1e-9)


@pytest.mark.parametrize(
    ("encoder", "lora", "changes"),
    [
        ("whisper", "both", {}),
        ("whisper", "neither", {"ctc_loss_weight": 0.0}),
        ("hubert", "both", {}),
        ("hubert", "both", {"gradient_checkpointing": True}),
        ("parakeet", "both", {}),
    ],
)
def test_the_memory_is_that_of_a_real_step(build, encoder, lora, changes, monkeypatch):
    """Tensor bytes at the fullest moment of a real step with its optimizer, attention fused."""
    processor, model = build(encoder, lora=lora)
    settings = SETTINGS | changes
    prepare(model, settings)
    for module in model.encoder.modules():  # a GPU's fused attention has dropout, a CPU's has none
        for key in {"dropout", "attention_dropout"} & set(vars(module)):
            setattr(module, key, 0.0)
    loss, described = real_step(monkeypatch, model, processor, settings, clips=4, seconds=6.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss().backward()
    optimizer.step()  # makes its states
    optimizer.zero_grad()
    recorder = plan.Recorder()
    recorder.track([*model.parameters(), *model.buffers()])
    recorder.track([state for states in optimizer.state.values() for state in states.values()])
    with recorder:
        loss().backward()
        optimizer.step()
    planned = sum(plan.count(plan.meta_copy(model), settings, **described).memory.values())
    assert planned == pytest.approx(recorder.most, rel=0.15)
    states = sum(p.nbytes for p in model.parameters())
    assert recorder.most > 1.5 * states  # what the step needs beside the weights is what is tested


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """`planned("+experiments=stage1", ...)`: the command beside a Hub cache of the two configs."""
    home = tmp_path_factory.mktemp("hf")
    for repo, file in BIG.items():
        folder = home / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        config = (ROOT / "tests/fixtures" / file).read_text()
        (folder / "snapshots" / ("0" * 40) / "config.json").write_text(config)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        code = "import sys; from tiny_audio.commands.plan import main; sys.exit(main(sys.argv[1:]))"
        env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


def test_a_measured_utilisation_replaces_the_assumed_one(monkeypatch):
    assert utilisation("h100", None) == (0.4, "assumed")
    measured = {"utilisation": 0.37, "date": "2026-12-01"}
    monkeypatch.setitem(plan.GPUS["h100"], "measured", measured)
    assert utilisation("h100", None) == (0.37, "measured 2026-12-01")
    assert utilisation("a40", None) == (0.4, "assumed")
    assert utilisation("h100", 0.5) == (0.5, "given")


@pytest.mark.long
def test_the_plan_of_the_page_is_what_the_command_prints(planned):
    page = (ROOT / "docs/price.md").read_text()
    said = page.split("<!-- plan:begin -->\n```\n")[1].split("\n```\n<!-- plan:end -->")[0]
    command = next(x for x in page.splitlines() if x.startswith("tiny-audio plan +"))
    done = planned(*command.split()[2:])
    assert done.returncode == 0, done.stderr[-3000:]
    clean = [[line.rstrip() for line in text.strip().splitlines()] for text in (done.stdout, said)]
    assert clean[0] == clean[1], f"docs/price.md: write what `{command}` prints between its marks"


@pytest.mark.long
def test_a_plan_takes_less_than_20_seconds(planned):
    started = os.times().children_user
    assert planned("+experiments=stage1").returncode == 0
    assert os.times().children_user - started < 20


@pytest.mark.long
def test_batches_of_five_on_forty_gigabytes(planned):
    """What docs/price.md says about a batch of 5 is what the command says."""
    batch = ["seconds=30", "training.per_device_train_batch_size=5", "training.batch_seconds=150"]
    for changes, memory, verdict in (
        ([], "= 16.9 GB", "gaps: fits"),
        (["training.gradient_checkpointing=false"], "= 41.0 GB", "gaps: too big"),
    ):
        done = planned("+experiments=stage1", "gpu=a100-40", *batch, *changes)
        assert memory in done.stdout and verdict in done.stdout
    page = (ROOT / "docs/price.md").read_text()
    assert "16.9 GB with gradient checkpointing and 41.0 GB without" in page


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["gpu=a41"], "did you mean 'a40'"),
        (["utilisation=40"], "utilisation at most 1"),
        (["seconds=0"], "must be above 0"),
        (["stages.0.training.max_steps=-1"], "plan needs training.max_steps"),
        (["+experiments=stage9"], "Available options in 'experiments': "),
        (["training.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["lerning_rate=1"], "Could not override 'lerning_rate'"),
        (["training.x=["], "no viable alternative"),
        (["training.learning_rate=1"], "overridden by stage projector"),
        (["model.encoder_model_name=/no/folder"], "no such folder; `make quickstart` fetches"),
        (["+training.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["model.encoder_model_name=no/such", "price=x"], "could not convert"),
        (["model.encoder_model_name=no/such"], "no/such"),
    ],
)
def test_what_is_wrong_is_said(arguments, hint, capsys):
    assert cli.main(["plan", "+experiments=stage1", *arguments]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and hint in said


@pytest.fixture
def tiny(tiny_bases):
    """Arguments that put tiny base models into a plain run."""
    return [
        f"model.encoder_model_name={tiny_bases / 'whisper'}", "model.encoder_revision=null",
        f"model.decoder_model_name={tiny_bases / 'decoder'}", "model.decoder_revision=null",
        "model.projector_hidden=32", "seconds=1.2", "price=0.5",
    ]  # fmt: skip


def test_hours_at_a_price_buy_steps(tiny, capsys):
    lines = []
    for hours in (24, 12):
        assert main([*tiny, f"hours={hours}"]) == 0
        lines.append(next(x for x in capsys.readouterr().out.splitlines() if " buy " in x))
    assert lines[0].startswith("24 hours $12.00 buy ")
    assert lines[1].startswith("12 hours $6.00 buy ")


def test_a_device_is_found_by_the_name_that_torch_gives_it():
    known: dict[str, str | None] = {"NVIDIA A40": "a40", "NVIDIA L4": "l4", "NVIDIA L40S": "l40s"}
    known |= {"NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA H100 80GB HBM3": "h100"}
    for device in ("Tesla T4", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 PCIe"):
        known[device] = None  # near by name, far by speed
    assert {device: plan.gpu_of(device) for device in known} == known
    assert all(facts["source"] and facts["tflops"] > 50 for facts in plan.GPUS.values())
