"""What each encoder family needs beyond its transformers class.

- Whisper runs at the real length of the audio instead of 30 s.
- The group norm of the smaller HuBERT and wav2vec2 models ignores padding in its statistics.
- Fine-tuned HuBERT, wav2vec2 and WavLM models bring a CTC head.
- Parakeet's encoder is loaded from a CTC or transducer model.

Shapes: b clips, n input steps, t encoder frames, c channels, d the encoder's hidden size.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCTC, AutoTokenizer, ParakeetEncoder
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .asr_config import WAVEFORM_ENCODERS

logger = logging.getLogger(__name__)
UNKNOWN_LOGIT = -15.0  # logit of a character that the encoder's own CTC head lacks


class WhisperEncoderHalf(WhisperEncoder):
    """Whisper's encoder, loaded from a full checkpoint without its decoder."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", "proj_out"]  # noqa: RUF012


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm over time, one channel per group, that ignores padding in its statistics.

    With `lengths` (b,) in steps, a clip is normalised as it would be alone. Those of
    the transformers library count padding as silence.
    """

    lengths: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(b, c, n) -> (b, c, n), zero beyond `lengths`."""
        if self.lengths is None:
            return super().forward(input)
        inside = torch.arange(input.shape[2], device=input.device) < self.lengths[:, None]
        inside, count = inside[:, None].float(), self.lengths[:, None, None]  # sums exceed fp16
        mean = (input * inside).sum(2, keepdim=True) / count
        centred = (input - mean) * inside
        variance = centred.square().sum(2, keepdim=True) / count
        out = centred * torch.rsqrt(variance + self.eps)
        return ((out * self.weight[:, None] + self.bias[:, None]) * inside).to(input.dtype)


def mask_group_norm(encoder: nn.Module) -> None:
    """Replace every group norm of an encoder with a `MaskedGroupNorm`."""
    for name, norm in list(encoder.named_modules()):
        if isinstance(norm, nn.GroupNorm):
            masked = MaskedGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
            masked.weight, masked.bias = norm.weight, norm.bias
            encoder.set_submodule(name, masked)


def encoder_class(base: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class that loads the encoder of a base model's config, and its arguments."""
    if base.model_type == "whisper":  # without its decoder
        return WhisperEncoderHalf, {"key_mapping": {r"^(model\.)?encoder\.": ""}}
    if base.model_type.startswith("parakeet"):  # without its CTC or transducer head
        config = vars(base).get("encoder_config", base)
        return ParakeetEncoder, {"key_mapping": {r"^encoder\.": ""}, "config": config}
    return (AutoModelForCTC if has_ctc_head(base) else AutoModel), {}


def has_ctc_head(base: Any) -> bool:
    """Tell whether a base model was fine-tuned to spell with CTC, as HuBERT-ls960-ft was.

    Parakeet's head outputs word pieces at 12.5 Hz, so a character head cannot start from it.
    """
    named = any(name.endswith("ForCTC") for name in base.architectures or ())
    return named and base.model_type in WAVEFORM_ENCODERS


def read_ctc_head(
    model: Any, alphabet: Sequence[int], name: str, **hub: Any
) -> tuple[Tensor, Tensor]:
    """Read the CTC head of a fine-tuned encoder, with rows in the order of our classes.

    Args:
        model: `HubertForCTC`, `Wav2Vec2ForCTC` or `WavLMForCTC`.
        alphabet: byte of each class from 1 on; class 0 is the blank.
        name: Hub id or folder that also holds the vocabulary.
        hub: `revision` and other arguments of `from_pretrained`.

    Returns:
        Weights (c, d) and biases (c,).

    Raises:
        ValueError: if the vocabulary is missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, TypeError) as error:  # TypeError: no vocab.json
        raise ValueError(f"{name} has a CTC head, but no vocabulary: {error}") from error
    row_of = {token.lower(): row for token, row in tokenizer.get_vocab().items()}
    row_of[" "] = row_of[tokenizer.word_delimiter_token.lower()]
    weight = torch.zeros(len(alphabet) + 1, model.lm_head.in_features)
    bias = torch.full((len(alphabet) + 1,), UNKNOWN_LOGIT)
    # A byte of 128 or more is part of a letter, and these heads only have whole letters.
    letters = [chr(byte) if byte < 128 else f"byte {byte}" for byte in alphabet]
    rows = [model.config.pad_token_id, *(row_of.get(letter, -1) for letter in letters)]
    known = torch.tensor(rows) >= 0
    weight[known] = model.lm_head.weight.detach().float()[rows][known]
    bias[known] = model.lm_head.bias.detach().float()[rows][known]
    if unknown := [letter for letter, row in zip(letters, rows[1:], strict=True) if row < 0]:
        logger.warning("the CTC head of %s lacks %s: training must learn them", name, unknown)
    return weight, bias


def build_encoder(audio_config: Any) -> nn.Module:
    """Build an encoder with random weights from its config, without a decoder."""
    if audio_config.model_type == "whisper":
        return WhisperEncoderHalf(audio_config)
    return AutoModel.from_config(audio_config)


def run_encoder(encoder: Any, config: Any, features: Tensor, mask: Tensor) -> Tensor:
    """Features (b, n) or (b, mels, n) and their mask (b, n) -> frames (b, t, d).

    Frames beyond a clip's length are arbitrary. A clip's own frames do not depend on padding.
    """
    features = features.to(encoder.dtype)
    if config.model_type == "whisper":
        return encode_whisper(encoder, features, mask)
    for module in encoder.modules():
        if isinstance(module, MaskedGroupNorm):  # it follows the first convolution
            kernel, stride = config.conv_kernel[0], config.conv_stride[0]
            module.lengths = (mask.sum(1) - kernel) // stride + 1
    if features.ndim == 3:  # Parakeet expects (b, n, mels)
        features = features.transpose(1, 2)
    return encoder(features, attention_mask=mask.long()).last_hidden_state


def encode_whisper(encoder: Any, features: Tensor, mask: Tensor) -> Tensor:
    """Run Whisper's encoder at the real length instead of 30 s: (b, mels, n) -> (b, t, d).

    Position embeddings are cut to t. Padding is zeroed before each convolution and hidden from
    attention, so a clip's frames do not depend on the rest of the batch.

    Raises:
        ValueError: if the audio is longer than the encoder's positions.
    """
    mask = mask[:, None].to(features.dtype)  # (b, 1, n)
    positions = encoder.embed_positions.weight
    x = F.gelu(encoder.conv1(features * mask)) * mask
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)  # (b, t, d)
    t = x.shape[1]
    if t > len(positions):
        raise ValueError(
            f"{t} encoder frames, but Whisper has {len(positions)} positions: split audio that is "
            "longer than 30 s (the pipeline does this)"
        )
    x = F.dropout(x + positions[:t], p=encoder.dropout, training=encoder.training)
    visible = mask[:, 0, ::2].bool()  # (b, t): frame i sees input step 2 i
    attention_mask = create_bidirectional_mask(encoder.config, x, visible)
    for layer in encoder.layers:
        x = layer(x, attention_mask)
    return encoder.layer_norm(x)
