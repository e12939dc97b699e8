"""Clips packed into one sequence give the decoder's states and gradients of each clip alone."""

import pytest
import torch
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    SmolLM3Config,
    StableLmConfig,
    WhisperConfig,
)

from tiny_audio.asr.asr_config import ASRConfig
from tiny_audio.asr.asr_decoding import read_prompts
from tiny_audio.asr.asr_modeling import ASRModel
from tiny_audio.asr.asr_packing import as_rows, pack

SHAPE = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
DECODERS = {
    "llama": LlamaConfig(**SHAPE),
    "smollm3": SmolLM3Config(**SHAPE),
    "sliding window": MistralConfig(**SHAPE, sliding_window=4),
    "sliding and full": Gemma3TextConfig(
        **SHAPE, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
}
LENGTHS = [5, 1, 8, 3]


def build(text_config):
    torch.manual_seed(0)
    config = ASRConfig(audio_config=WhisperConfig(**ENCODER), text_config=text_config)
    return ASRModel(config).eval()


def left_padded(shared):
    """Random rows (b, s, d) that take gradients and begin alike, and their mask (b, s)."""
    lengths = shared + torch.tensor(LENGTHS)
    width = int(lengths.max())
    mask = torch.arange(width) >= width - lengths[:, None]
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(len(LENGTHS), width, SHAPE["hidden_size"], generator=generator)
    for row, length in zip(embeds, lengths, strict=True):
        row[width - length : width - length + shared] = embeds[0, :shared]
    return embeds.requires_grad_(), mask


def each_alone(model, embeds, mask, shared):
    """The states of one row at a time, without padding."""
    rows = [embeds[i, real][None] for i, real in enumerate(mask)]
    run = model.decoder.base_model
    return torch.cat([run(inputs_embeds=row, use_cache=False).last_hidden_state[0, shared:]
                      for row in rows])  # fmt: skip


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("kind", DECODERS)
def test_packed_clips_have_the_states_and_gradients_of_each_clip_alone(kind, shared):
    model = build(DECODERS[kind])
    weight = model.decoder.base_model.layers[0].self_attn.k_proj.weight.requires_grad_()
    embeds, mask = left_padded(shared)
    packed, _ = model.run_decoder(embeds, mask, shared)
    model.decoder.set_attn_implementation("sdpa")
    alone = each_alone(model, embeds, mask, shared)
    assert torch.allclose(packed, alone, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(x.square().sum(), (weight, embeds)) for x in (packed, alone)
    )
    assert torch.allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    own = mask & (mask.cumsum(1) > shared)
    assert torch.allclose(ours[1][own], theirs[1][own], rtol=1e-4, atol=1e-4)
    start = mask & ~own  # read in the first row alone, which takes the gradients of all
    assert torch.allclose(ours[1][start].sum(0), theirs[1][start].sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [GraniteConfig(**SHAPE, logits_scaling=8.0),
                                  Gemma2Config(**SHAPE, final_logit_softcapping=30.0)])  # fmt: skip
def test_a_decoder_that_changes_its_logits_is_refused(kind):
    with pytest.raises(ValueError, match="or it rescales its logits"):
        build(kind).run_decoder(*left_padded(2), 2)


def test_the_decoder_computes_no_padding():
    model = build(DECODERS["llama"])
    seen = []
    model.decoder.base_model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape[:2]))
    )
    model.run_decoder(*left_padded(2), 2)
    assert seen == [(1, 2 + sum(LENGTHS))]


def test_packed_tokens_are_copied_into_rows_that_begin_alike():
    _, mask = left_padded(0)
    places, shape = pack(mask, start=2)
    packed = torch.arange(2.0 + sum(LENGTHS)).view(1, 1, -1, 1)
    rows = as_rows(packed, places, shape)[:, 0, :, 0]
    assert rows.shape == (len(LENGTHS), 2 + max(LENGTHS))
    assert rows[1].tolist() == [0, 1, 7, *[0] * 7]
    assert rows[2].tolist() == [0, 1, *range(8, 16)]
    assert rows.flatten()[places].tolist() == packed.flatten().tolist()


@pytest.mark.parametrize(
    "config",
    [
        Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
        StableLmConfig(**SHAPE),  # its layers do not pass on what attention needs
        GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1),  # not SDPA
        FalconConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=4),
    ],
    ids=lambda config: config.model_type,
)
def test_a_decoder_that_cannot_read_packed_clips_is_not_trained_but_reads_rows(config):
    model = build(config)
    embeds, mask = left_padded(0)
    with pytest.raises(ValueError, match="cannot be trained on packed clips"):
        model.run_decoder(embeds, mask, 0)
    prompts = read_prompts(model.decoder, embeds, mask.long())
    for i, real in enumerate(mask):
        alone = read_prompts(model.decoder, embeds[i : i + 1, real], mask[i : i + 1, real].long())
        assert torch.allclose(prompts.last[i], alone.last[0], rtol=1e-4, atol=1e-5)
