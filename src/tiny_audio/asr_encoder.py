"""What an encoder family needs beyond its transformers class: Whisper at the real length.

Waveform encoders (HuBERT, wav2vec2, WavLM) take lengths and masks as they are. Shapes: b clips, n
mel frames, t encoder frames, d the encoder's hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class WhisperEncoderHalf(WhisperEncoder):
    """Whisper's encoder, loaded from a checkpoint whose decoder is not wanted."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", "proj_out"]  # noqa: RUF012


def build_encoder(audio_config: Any) -> nn.Module:
    """An encoder with random weights from its config (the encoder half, for Whisper)."""
    if audio_config.model_type == "whisper":
        return WhisperEncoderHalf(audio_config)
    return AutoModel.from_config(audio_config)


def encode_whisper(encoder: Any, features: Tensor, mask: Tensor) -> Tensor:
    """Whisper's encoder at the real length instead of 30 s: (b, mels, n) -> (b, t, d).

    Position embeddings are cut to t; padding is zeroed before each convolution and hidden from
    attention, so that a clip's frames do not depend on what else is in the batch.

    Raises:
        ValueError: when the audio is longer than the encoder's positions.
    """
    mask = mask[:, None].to(features.dtype)  # (b, 1, n)
    positions = encoder.embed_positions.weight
    dtype = encoder.conv1.weight.dtype
    x = F.gelu(encoder.conv1((features * mask).to(dtype))) * mask.to(dtype)
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)  # (b, t, d)
    t = x.shape[1]
    if t > len(positions):
        raise ValueError(
            f"{t} encoder frames, but Whisper has {len(positions)} positions: audio over 30 s must "
            "be split (the pipeline does)"
        )
    x = F.dropout(x + positions[:t], p=encoder.dropout, training=encoder.training)
    visible = mask[:, 0, ::2].bool()  # (b, t): frame i sees input step 2 i
    bias = torch.zeros(len(x), 1, 1, t, dtype=x.dtype, device=x.device)
    bias = bias.masked_fill(~visible[:, None, None], torch.finfo(x.dtype).min)
    for layer in encoder.layers:
        out = layer(x, bias.expand(-1, -1, t, -1))
        x = out[0] if isinstance(out, tuple) else out
    return encoder.layer_norm(x)
