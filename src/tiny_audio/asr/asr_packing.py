"""Run the decoder on clips that are packed into one sequence, without padding.

All layers but attention treat each token on its own, so they read the real tokens of a batch as one
long sequence. Only attention must keep the clips apart, so it reads them as padded rows. The tokens
with which all prompts begin come first in the sequence, once, and each row sees them.

Shapes: b clips, n packed tokens, w tokens of the longest row, shared start included.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# The name of our attention in transformers. A model folder's own copy of this file has another.
PACKED = f"packed ({__name__})"
ATTENTION = {"full_attention", "sliding_attention"}  # kinds of layers
# Settings of decoders that change the logits after their last layer; we would leave that out.
LOGITS = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
NO_MASK = (1, 1, 1, 1)  # shape of the mask that packed clips come with
NOT_PACKABLE = (
    "the decoder ({}) cannot be trained on packed clips: some of its layers are not attention, or "
    "use attention that ours cannot replace, or it rescales its logits; choose another, such as "
    "SmolLM, Llama or Qwen"
)
Shape = tuple[int, int, int]  # b, w, tokens of the shared start


def pack(mask: Tensor, start: int) -> tuple[Tensor, Shape]:
    """Find the place of each packed token in rows that are padded on the right.

    Args:
        mask: (b, s) bool, False for padding and for the tokens that all rows share.
        start: number of shared tokens, which every row begins with.

    Returns:
        `places` (n,): the index of each packed token in the flattened rows (b * w); the shared
        tokens come first, in the first row. Then the shape of the rows.
    """
    width = start + int(mask.sum(1).max())
    column = start + mask.cumsum(1) - 1
    row = torch.arange(len(mask), device=mask.device)[:, None]
    places = torch.cat([torch.arange(start, device=mask.device), (row * width + column)[mask]])
    return places, (len(mask), width, start)


def as_rows(packed: Tensor, places: Tensor, shape: Shape) -> Tensor:
    """Copy packed queries, keys or values (1, heads, n, d) into rows (b, heads, w, d).

    A lookup would read the padding many times, and its backward pass would have to add that up.
    """
    clips, width, start = shape
    _, heads, _, d = packed.shape
    rows = packed.new_zeros(heads, clips * width, d).index_copy_(1, places, packed[0])
    rows = rows.view(heads, clips, width, d)
    rows[:, 1:, :start] = rows[:, :1, :start]
    return rows.transpose(0, 1)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    places: Any = None, shape: Any = None, attend: Any = sdpa_attention_forward, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each row of a packed sequence; without `places`, attend as usual.

    Padding is on the right of a row, where causal attention never looks.

    Args:
        query, key, value: (1, heads, n, d) if packed, as transformers passes them.
        attention_mask: not used for packed clips.
        places, shape: from `pack`.
        attend: attention of a batch of rows.

    Raises:
        ValueError: if the decoder's layers do not pass `places` on to their attention.
    """
    if places is None:
        if query.shape[2] > 1 and attention_mask is not None and attention_mask.shape == NO_MASK:
            raise ValueError(NOT_PACKABLE.format(type(module).__name__))
        return attend(module, query, key, value, attention_mask, **kwargs)
    width, window, near = shape[1], kwargs.get("sliding_window"), None
    if window and window < width:
        near = query.new_ones(width, width, dtype=torch.bool).tril().triu(1 - window)
    rows = [as_rows(packed, places, shape) for packed in (query, key, value)]
    out, _ = attend(module, *rows, near, is_causal=near is None, **kwargs)
    return out.flatten(0, 1).index_select(0, places)[None], None


def use_packed_attention(decoder: Any) -> None:
    """Give a decoder the attention that reads packed clips, if all its layers can have it."""
    kinds = set(getattr(decoder.config, "layer_types", None) or ATTENTION)
    plain = all(getattr(decoder.config, key, value) == value for key, value in LOGITS.items())
    if kinds <= ATTENTION and decoder._supports_sdpa and plain:
        decoder.set_attn_implementation(PACKED)


def check_packed(decoder: Any) -> None:
    """Raise ValueError if a decoder cannot read packed clips, and therefore cannot be trained."""
    if PACKED not in decoder.config._attn_implementation:
        raise ValueError(NOT_PACKABLE.format(decoder.config.model_type))


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
