"""Choices that matter on a GPU alone, tested on the CPU: dtypes, attention, what is moved where."""

import pytest
import torch
from conftest import TEXTS, WAVEFORM_SHAPE
from torch.nn import functional as F
from transformers import ParakeetEncoder, WavLMModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiny_audio.asr.asr_bases import choose_attention
from tiny_audio.asr.asr_config import DECODE
from tiny_audio.asr.asr_decoding import transcribe
from tiny_audio.asr.asr_modeling import ASRModel

SMALL = {
    WavLMModel: WAVEFORM_SHAPE,
    ParakeetEncoder: {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "intermediate_size": 64, "subsampling_conv_channels": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(build, tmp_path_factory):
    """`saved("whisper", whole=True)`: the folder of a tiny model with LoRA on both ends."""

    def save(encoder: str, whole: bool):
        folder = tmp_path_factory.mktemp(encoder)
        processor, model = build(encoder, lora="both")
        model.save_pretrained(folder, self_contained=whole)
        processor.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("whole", [False, True])
def test_all_that_is_trained_is_float32_over_bfloat16_bases(saved, whole):
    """AdamW cannot move a bfloat16 weight by less than 1/256 of it."""
    model = ASRModel.from_pretrained(saved("hubert", whole), dtype=torch.bfloat16)
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert any(".lora_" in name for name in trained)
    assert set(trained.values()) == {torch.float32}
    assert model.encoder.dtype == model.decoder.dtype == torch.bfloat16


def test_bfloat16_keeps_the_positions_exact(saved):
    """Rotary frequencies are no weights: rounded to 8 bits, late positions would be wrong."""
    folder = saved("whisper", True)
    exact, half = (ASRModel.from_pretrained(folder, dtype=d) for d in (None, torch.bfloat16))
    assert torch.equal(
        half.decoder.model.rotary_emb.inv_freq, exact.decoder.model.rotary_emb.inv_freq
    )


def flash_on_cpu(module, query, key, value, attention_mask, **kwargs):
    """What FlashAttention computes: it takes a mask of padding (b, s) or none, and no other."""
    assert attention_mask is None or attention_mask.ndim == 2, attention_mask.shape
    new, s = query.shape[2], key.shape[2]  # behind a cache the queries are the last of s
    visible = torch.ones(len(query), 1, new, s, dtype=torch.bool)
    if kwargs.get("is_causal", module.is_causal):
        visible = visible.tril(s - new)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None].bool()
        visible[..., -1] |= ~visible.any(-1)  # a row of padding sees something: no NaN
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scale = kwargs.get("scaling")
    out = F.scaled_dot_product_attention(query, key, value, visible, scale=scale)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("encoder", ["whisper", "hubert"])
def test_flash_attention_gets_only_masks_that_it_knows(build, clips, monkeypatch, encoder):
    """The whole of decoding and training by it is what it is by transformers' default."""
    processor, model = build(encoder, lora="both")
    batch = processor(clips[:3], list(TEXTS[:3]))

    def results():
        with torch.no_grad():
            hidden, steps = model.encode(batch["input_features"], batch["input_features_mask"])
            found = [transcribe(model, processor, hidden, steps, d) for d in DECODE]
            loss = model(**batch, ctc_loss_weight=0.2, character_loss_weight=0.2).loss
        return [[t.text for t in some] for some in found], loss.item()

    plain = results()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_on_cpu)
    used = []
    for part in (model.encoder, model.decoder):
        part.config._attn_implementation = "flash_attention_2"
        used.append(part.config)
    flash = results()
    assert all(config._attn_implementation == "flash_attention_2" for config in used)
    assert flash[0] == plain[0]
    assert flash[1] == pytest.approx(plain[1], rel=1e-5)


@pytest.mark.parametrize("kind", [ParakeetEncoder, WavLMModel])
def test_flash_attention_is_left_out_where_a_family_lacks_it(kind):
    model = kind(kind.config_class(**SMALL[kind]))
    choose_attention(model, "flash_attention_2")
    assert model.config._attn_implementation != "flash_attention_2"


@pytest.mark.parametrize("encoder", ["hubert", "parakeet"])
def test_no_layer_is_dropped_in_training(build, encoder):
    """A LoRA without a gradient makes DDP fail where gradient checkpointing is on."""
    _, model = build(encoder, lora="both")
    assert model.encoder.config.layerdrop == 0.0
