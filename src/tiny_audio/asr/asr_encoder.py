"""Encoder families: all that the rest of the code needs to know about an encoder.

`family_of` finds the family of an encoder by its config. To add a family, derive a class from
`EncoderFamily` and list it in `FAMILIES`.

Shapes: b clips, n input steps (samples or mel frames), t encoder frames, c channels, d the
encoder's hidden size.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCTC, AutoTokenizer, ParakeetEncoder
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

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


class EncoderFamily:
    """HuBERT, wav2vec2 and WavLM, which read samples; base class of the other families.

    Attributes:
        hop: samples per input step.
        geometry: settings of the encoder that determine the number of frames.
        longest_seconds: longest clip that the encoder can take.
        lora_layers: classes of the layers to which `adapt` adds a LoRA.
        spells: whether CTC heads of this family output letters.
    """

    hop = 1
    geometry: tuple[str, ...] = ("conv_kernel", "conv_stride")
    longest_seconds = math.inf
    lora_layers: tuple[type[nn.Module], ...] = (nn.Linear,)
    spells = True

    def frames(self, config: Any, n: Any) -> Any:
        """Compute how many encoder frames `n` input steps give; an int or an integer tensor."""
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            n = (n - kernel) // stride + 1
        return n

    def mels(self, config: Any) -> int | None:
        """Number of mel channels of an input step; None if the encoder reads samples."""
        return getattr(config, "num_mel_bins", None)

    def features(self, extracted: Any) -> np.ndarray:
        """Output of the feature extractor for one clip -> (n,) or (n, mels)."""
        return extracted["input_values"][0]

    def has_ctc_head(self, base: Any) -> bool:
        """Tell whether a base model was fine-tuned to spell with CTC, as HuBERT-ls960-ft was."""
        return self.spells and any(name.endswith("ForCTC") for name in base.architectures or ())

    def loader(self, base: Any) -> tuple[Any, dict[str, Any]]:
        """Return the class that loads the encoder of a base model's config, and its arguments."""
        return (AutoModelForCTC if self.has_ctc_head(base) else AutoModel), {}

    def build(self, config: Any) -> nn.Module:
        """Build an encoder with random weights, without a decoder."""
        return AutoModel.from_config(config)

    def run(self, encoder: Any, features: Tensor, mask: Tensor) -> Tensor:
        """Features (b, n) or (b, mels, n) and their mask (b, n) -> frames (b, t, d).

        Frames beyond a clip's length are arbitrary. A clip's own frames do not depend on padding.
        """
        kernel, stride = encoder.config.conv_kernel[0], encoder.config.conv_stride[0]
        for module in encoder.modules():
            if isinstance(module, MaskedGroupNorm):  # it follows the first convolution
                module.lengths = (mask.sum(1) - kernel) // stride + 1
        return encoder(features, attention_mask=mask.long()).last_hidden_state


class WhisperFamily(EncoderFamily):
    """Whisper's encoder. It runs at the real length of the audio instead of 30 s."""

    hop = 160
    geometry = ()
    longest_seconds = 30.0  # it has no more positions
    lora_layers = (nn.Linear, nn.Conv1d)  # its two convolutions learn a room or a line
    spells = False

    def frames(self, config: Any, n: Any) -> Any:
        """Its second convolution has stride 2, kernel 3 and padding 1."""
        return (n + 1) // 2

    def features(self, extracted: Any) -> np.ndarray:
        """(1, mels, n) -> (n, mels)."""
        return extracted["input_features"][0].T

    def loader(self, base: Any) -> tuple[Any, dict[str, Any]]:
        """Load it without the decoder."""
        return WhisperEncoderHalf, {"key_mapping": {r"^(model\.)?encoder\.": ""}}

    def build(self, config: Any) -> nn.Module:
        """Build it without the decoder."""
        return WhisperEncoderHalf(config)

    def run(self, encoder: Any, features: Tensor, mask: Tensor) -> Tensor:
        """Cut the position embeddings to t; zero padding before each convolution and hide it.

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
                f"{t} encoder frames, but Whisper has {len(positions)} positions: split audio that "
                "is longer than 30 s (the pipeline does this)"
            )
        x = F.dropout(x + positions[:t], p=encoder.dropout, training=encoder.training)
        visible = mask[:, 0, ::2].bool()  # (b, t): frame i sees input step 2 i
        attention_mask = create_bidirectional_mask(encoder.config, x, visible)
        for layer in encoder.layers:
            x = layer(x, attention_mask)
        return encoder.layer_norm(x)


class ParakeetFamily(EncoderFamily):
    """Parakeet's encoder, loaded from a CTC or transducer model."""

    hop = 160
    geometry = ("subsampling_factor",)
    spells = False  # its CTC head outputs word pieces at 12.5 Hz

    def frames(self, config: Any, n: Any) -> Any:
        """Its convolutions have stride 2 and "same" padding."""
        for _ in range(int(config.subsampling_factor).bit_length() - 1):
            n = (n + 1) // 2
        return n

    def features(self, extracted: Any) -> np.ndarray:
        """Cut the frame that only pads: (1, n + 1, mels) -> (n, mels)."""
        return extracted["input_features"][0][: int(extracted["attention_mask"][0].sum())]

    def loader(self, base: Any) -> tuple[Any, dict[str, Any]]:
        """Load it without the CTC or transducer head."""
        options = {"key_mapping": {r"^encoder\.": ""}, "config": encoder_config(base)}
        return ParakeetEncoder, options

    def run(self, encoder: Any, features: Tensor, mask: Tensor) -> Tensor:
        """It expects (b, n, mels)."""
        return encoder(features.transpose(1, 2), attention_mask=mask.long()).last_hidden_state


WAVEFORM_ENCODERS = ("hubert", "wav2vec2", "wavlm")
FAMILIES = {
    **dict.fromkeys(WAVEFORM_ENCODERS, EncoderFamily()),
    "whisper": WhisperFamily(),
    "parakeet_encoder": ParakeetFamily(),
}


def encoder_config(base: Any) -> Any:
    """Return the encoder's part of a base model's config; Parakeet's is nested."""
    return vars(base).get("encoder_config", base)


def family_of(config: Any) -> EncoderFamily:
    """Return the family of an encoder's or base model's config.

    Raises:
        ValueError: if it is not supported.
    """
    kind = encoder_config(config).model_type
    if kind not in FAMILIES:
        raise ValueError(f"encoder type {kind!r} is not supported; use one of {sorted(FAMILIES)}")
    return FAMILIES[kind]
