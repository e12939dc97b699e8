"""Choices that matter on a GPU alone, tested on the CPU: dtypes, attention, what is moved where."""

import pytest
import torch

from tiny_audio.asr_modeling import ASRModel


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
