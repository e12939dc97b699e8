"""Train the decoder on clips that are packed into one sequence, without padding.

All layers but attention treat each token on its own, so they read the real tokens of a batch as one
long sequence. Attention alone needs the clips apart: it reads them as padded rows. The tokens that
begin every prompt stand once, at the start of the sequence, and each row sees them.

Shapes: b clips, n packed tokens, w tokens of the longest row, shared start included.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"  # the name that transformers knows our attention by


def pack(mask: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Map padded rows to a packed sequence, and back.

    Args:
        mask: (b, s) bool, False for padding and for the tokens that all rows share.
        start: number of shared tokens, which every row begins with.

    Returns:
        rows: (b, w) the packed tokens of each row, `start` first; padding, on the right, is 0.
        places: (n,) the place of each packed token in the flattened rows.
    """
    lengths = mask.sum(1)
    columns = torch.arange(int(lengths.max()), device=mask.device)
    inside = columns < lengths[:, None]
    first = start + lengths.cumsum(0) - lengths
    own = (first[:, None] + columns).masked_fill(~inside, 0)
    shared = torch.arange(start, device=mask.device).expand(len(mask), start)
    rows = torch.cat([shared, own], 1)
    flat = torch.arange(rows.numel(), device=mask.device).view_as(rows)
    return rows, torch.cat([flat[0, :start], flat[:, start:][inside]])


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    rows: Tensor | None = None, places: Any = None,
    attend: Callable[..., Any] = sdpa_attention_forward, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each row of a packed sequence; without `rows`, attend as usual.

    Padding is on the right of a row, where causal attention never looks.

    Args:
        query, key, value: (1, heads, n, d), as transformers passes them.
        rows, places: from `pack`.
        attend: attention of a batch of rows.
    """
    if rows is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    width, window, near = rows.shape[1], kwargs.get("sliding_window"), None
    if window and window < width:
        near = (
            torch.ones(width, width, dtype=torch.bool, device=rows.device).tril().triu(1 - window)
        )
    query, key, value = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))
    out, _ = attend(module, query, key, value, near, is_causal=near is None, **kwargs)
    return out.flatten(0, 1)[places][None], None


def use_packed_attention(decoder: Any) -> None:
    """Give a decoder the attention that reads packed clips.

    Raises:
        ValueError: if it has layers that are not attention, or attention that is not replaceable.
    """
    attention = {"full_attention", "sliding_attention"}
    kinds = set(getattr(decoder.config, "layer_types", None) or attention)
    decoder.set_attn_implementation(PACKED)
    if kinds - attention or decoder.config._attn_implementation != PACKED:
        raise ValueError(
            f"a decoder of type {decoder.config.model_type!r} cannot read packed clips: "
            "all its layers must use attention that transformers lets us replace"
        )


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
