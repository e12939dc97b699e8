"""Read Whisper's weights from a CTranslate2 model, as package registries carry them."""

import re
import struct
from pathlib import Path

import numpy as np
import torch

# numpy dtypes by CTranslate2's id (its model_spec.py). Id 5, bfloat16, does not occur here.
CT2_DTYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")
# CTranslate2's names to transformers', applied in order. "a|b" is a fused tensor, split by rows.
CT2_NAMES = {
    r"/layer_(\d+)/": r"/layers/\1/",
    "/gamma": "/weight",
    "/beta": "/bias",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn.q_proj|k_proj|v_proj",
    "self_attention/linear_1": "self_attn.out_proj",
    "/attention/layer_norm": "/encoder_attn_layer_norm",
    "/attention/linear_0": "/encoder_attn.q_proj",
    "/attention/linear_1": "/encoder_attn.k_proj|v_proj",
    "/attention/linear_2": "/encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "position_encodings/encodings": "embed_positions.weight",
    "embeddings/weight": "embed_tokens.weight",
    "/": ".",
}


def read_ctranslate2(path: Path, first: str, count: int) -> dict[str, np.ndarray]:
    """Read `count` consecutive variables of a CTranslate2 model.bin, starting at `first`.

    Layout of a variable, little endian: uint16 length of the name including its NUL, the name,
    uint8 rank, uint32 dimensions, uint8 dtype, uint32 size in bytes, data.
    """
    raw = path.read_bytes()
    at = raw.index(f"{first}\0".encode()) - 2
    variables = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", raw, at)
        name = raw[at + 2 : at + 1 + length].decode()
        at += 2 + length
        layout = f"<{raw[at]}IBI"
        *shape, dtype, size = struct.unpack_from(layout, raw, at + 1)
        at += 1 + struct.calcsize(layout)
        variables[name] = np.frombuffer(raw[at : at + size], CT2_DTYPES[dtype]).reshape(shape)
        at += size
    return variables


def whisper_state_dict(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Convert CTranslate2 variables to float32 tensors with the names of `WhisperModel`.

    Splits fused tensors: q, k, v of self attention, and k, v of cross attention. Drops the zero
    bias of k, which `WhisperModel` does not have. A name without a rule stays unchanged, so a
    strict `load_state_dict` reports it.
    """
    state = {}
    for name, values in variables.items():
        if not values.ndim:  # a scalar setting, such as the number of heads
            continue
        for pattern, replacement in CT2_NAMES.items():
            name = re.sub(pattern, replacement, name)
        module, _, kind = name.rpartition(".")
        prefix, _, leaves = module.rpartition(".")
        parts = np.split(values.astype(np.float32), len(leaves.split("|")))
        for leaf, part in zip(leaves.split("|"), parts, strict=True):
            if (leaf, kind) != ("k_proj", "bias"):
                state[f"{prefix}.{leaf}.{kind}"] = torch.from_numpy(part)
    return state
