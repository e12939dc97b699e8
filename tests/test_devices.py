"""Choices that matter on a GPU alone, tested on the CPU: dtypes, attention, what is moved where."""

import pytest
import torch
from conftest import TEXTS

from tiny_audio.asr.asr_config import DECODE
from tiny_audio.asr.asr_decoding import transcribe
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_packing import PACKED
from tiny_audio.asr.asr_processing import ASRProcessor


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


@pytest.mark.parametrize("whole", [False, True])
def test_an_encoder_with_sdpa_and_eager_attention_reads_the_same_and_no_other_is_taken(
    saved, clips, whole
):
    folder = saved("whisper", whole)
    processor = ASRProcessor.from_pretrained(folder)
    batch = processor(clips[:3], list(TEXTS[:3]))

    def results(attention):
        model = ASRModel.from_pretrained(folder, attn_implementation=attention)
        assert model.encoder.config._attn_implementation == (attention or "sdpa")
        assert model.decoder.config._attn_implementation == PACKED
        with torch.no_grad():
            hidden, steps = model.encode(batch["input_features"], batch["input_features_mask"])
            found = [transcribe(model, processor, hidden, steps, d) for d in DECODE]
            loss = model(**batch, ctc_loss_weight=0.2, character_loss_weight=0.2).loss
        return [[t.text for t in some] for some in found], loss.item()

    default = results(None)
    assert results("sdpa") == default
    texts, loss = results("eager")
    assert texts == default[0] and loss == pytest.approx(default[1], rel=1e-5)
    with pytest.raises(ValueError, match="must be null, sdpa or eager, not 'flash_attention_2'"):
        ASRModel.from_pretrained(folder, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("encoder", ["hubert", "parakeet"])
def test_no_layer_is_dropped_in_training(build, encoder):
    """A LoRA without a gradient makes DDP fail where gradient checkpointing is on."""
    _, model = build(encoder, lora="both")
    assert model.encoder.config.layerdrop == 0.0
