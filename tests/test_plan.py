"""What a step is said to cost, against published sizes and against counted real steps."""

import pytest
import torch
from conftest import babble
from test_recipes import base_config, composed
from torch.utils.flop_counter import FlopCounterMode

from tiny_audio import plan
from tiny_audio import train as recipe
from tiny_audio.asr_config import ASRConfig

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
    config = ASRConfig(
        audio_config=base_config("hubert-xlarge-ls960-ft.json"),
        text_config=base_config("SmolLM3-3B.json"),
        stack=cfg.model.stack,
        projector_hidden=cfg.model.projector_hidden,
        encoder_lora=recipe.lora_from(cfg.encoder_lora),
        decoder_lora=recipe.lora_from(cfg.peft, cfg.peft.peft_method),
        **heads,
    )
    return plan.without_weights(config, torch.bfloat16), cfg.training


@pytest.mark.parametrize(
    ("overrides", "gflop"),  # of the decoder's path, counted independently: LoRA on both ends,
    [  # frozen encoder, cached frames; 8.4 s clips with 3 tokens a second
        ([], 403),
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


def real_step(model, processor, settings, clips=3, seconds=2.0, text="the cat sat on a red mat"):
    """Loss of a real batch of equal clips, and the arguments of `plan.count` that describe it."""
    batch = processor([babble(seconds, i) for i in range(clips)], [text] * clips)
    tokens = len(processor.tokenize(text))
    prompt = len(processor.prefix_ids) + len(processor.suffix_ids)
    weights = {key: settings[key] for key in recipe.LOSS_KEYS}
    described = {"seconds": seconds, "tokens": tokens, "clips": clips, "prompt": prompt}
    return (lambda: model(**batch, **weights).loss), described


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
def test_the_flops_are_those_of_a_real_step(build, encoder, lora, changes):
    processor, model = build(encoder, lora=lora)
    settings = SETTINGS | changes
    for config in (model.encoder.config, model.decoder.config):  # fused attention has no formula
        config._attn_implementation = "eager"
    model.train()
    for key, off in (("layerdrop", 0.0), ("apply_spec_augment", False)):  # chance
        if hasattr(model.encoder.config, key):
            setattr(model.encoder.config, key, off)
    if settings["gradient_checkpointing"]:
        model.gradient_checkpointing_enable()
    loss, described = real_step(model, processor, settings)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    cost = plan.count(model, settings, **described)
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
def test_the_memory_is_that_of_a_real_step(build, encoder, lora, changes):
    """Tensor bytes at the fullest moment of a real step with its optimizer, attention fused."""
    processor, model = build(encoder, lora=lora)
    settings = SETTINGS | changes
    model.train()
    for key, off in (("layerdrop", 0.0), ("apply_spec_augment", False)):  # chance
        if hasattr(model.encoder.config, key):
            setattr(model.encoder.config, key, off)
    if settings["gradient_checkpointing"]:
        model.gradient_checkpointing_enable()
    for module in model.encoder.modules():  # a GPU's fused attention has dropout, a CPU's has none
        for key in {"dropout", "attention_dropout"} & set(vars(module)):
            setattr(module, key, 0.0)
    loss, described = real_step(model, processor, settings, clips=4, seconds=6.0)
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
    planned = sum(plan.count(model, settings, **described).memory.values())
    assert planned == pytest.approx(recorder.most, rel=0.15)
    states = sum(p.nbytes for p in model.parameters())
    assert recorder.most > 1.5 * states  # what the step needs beside the weights is what is tested
