"""Train the decoder on clips that are packed into one sequence, without padding.

All layers but attention treat each token on its own, so they read the real tokens of a batch as one
long sequence. Attention alone needs the clips apart: it reads them as padded rows. The tokens that
begin every prompt stand once, at the start of the sequence, and each row sees them.

Shapes: b clips, n packed tokens, w tokens of the longest row, shared start included.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"  # the name that transformers knows our attention by
Shape = tuple[int, int, int]  # b, w, tokens of the shared start


def pack(mask: Tensor, start: int) -> tuple[Tensor, Shape]:
    """Find the place of each packed token in rows that are padded on the right.

    Args:
        mask: (b, s) bool, False for padding and for the tokens that all rows share.
        start: number of shared tokens, which every row begins with.

    Returns:
        `places` (n,) in the flattened rows (b * w), the shared tokens of the first row first, and
        the shape of the rows.
    """
    width = start + int(mask.sum(1).max())
    column = start + mask.cumsum(1) - 1
    row = torch.arange(len(mask), device=mask.device)[:, None]
    places = torch.cat([torch.arange(start, device=mask.device), (row * width + column)[mask]])
    return places, (len(mask), width, start)


def as_rows(packed: Tensor, places: Tensor, shape: Shape) -> Tensor:
    """Copy packed queries, keys or values (1, heads, n, d) into rows (b, heads, w, d).

    Copies, unlike a lookup of the tokens, have a backward pass that adds up no duplicates.
    """
    clips, width, start = shape
    _, heads, _, d = packed.shape
    rows = packed.new_zeros(heads, clips * width, d).index_copy_(1, places, packed[0])
    own = rows.view(heads, clips, width, d)[:, :, start:]
    shared = packed[0, :, None, :start].expand(-1, clips, -1, -1)
    return torch.cat([shared, own], 2).transpose(0, 1)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    places: Any = None, shape: Any = None, attend: Any = sdpa_attention_forward, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each row of a packed sequence; without `places`, attend as usual.

    Padding is on the right of a row, where causal attention never looks.

    Args:
        query, key, value: (1, heads, n, d), as transformers passes them.
        places, shape: from `pack`.
        attend: attention of a batch of rows.
    """
    if places is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    width, window, near = shape[1], kwargs.get("sliding_window"), None
    if window and window < width:
        near = query.new_ones(width, width, dtype=torch.bool).tril().triu(1 - window)
    rows = [as_rows(packed, places, shape) for packed in (query, key, value)]
    out, _ = attend(module, *rows, near, is_causal=near is None, **kwargs)
    return out.flatten(0, 1).index_select(0, places)[None], None


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
