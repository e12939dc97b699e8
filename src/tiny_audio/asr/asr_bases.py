"""Load the base models (encoder and decoder) and add LoRA to them."""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file, extract_commit_hash

from .asr_config import ASRConfig
from .asr_encoder import family_of, read_ctc_head

OPTIONAL_WEIGHT = "masked_spec_embed"  # checkpoints may lack it: SpecAugment uses it in training


def load_base(
    config: ASRConfig, part: str, dtype: torch.dtype | None, **kwargs: Any
) -> tuple[Any, tuple[Tensor, Tensor] | None]:
    """Load one of the base models that `config` names.

    The resolved commit is written into `config`.

    Args:
        config: names the models and their revisions.
        part: "encoder" or "decoder".
        dtype: dtype of the weights (default float32).
        kwargs: `attn_implementation`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The model, and the encoder's own CTC head (see `read_ctc_head`). The head is None if the
        model has none, or if `config.ctc_direct` is already set.

    Raises:
        OSError: if the model is not found.
        ValueError: if weights are missing, or if `check_attention` refuses the attention.
    """
    check_attention(kwargs.get("attn_implementation"))
    hub = {k: v for k, v in kwargs.items() if k != "attn_implementation"}
    name, revision = getattr(config, f"{part}_name"), getattr(config, f"{part}_revision")
    file = cached_file(name, "config.json", revision=revision, **hub)
    revision = extract_commit_hash(file, None) or revision
    base = AutoConfig.from_pretrained(name, revision=revision, **hub)
    kind: Any = AutoModelForCausalLM
    extra: dict[str, Any] = {}
    if part == "encoder":
        kind, extra = family_of(base).loader(base)
    options = {"dtype": dtype or torch.float32, "output_loading_info": True, **extra, **kwargs}
    model, info = kind.from_pretrained(name, revision=revision, **options)
    if "layerdrop" in vars(model.config):
        model.config.layerdrop = 0.0  # DDP fails if a dropped layer's LoRA has no gradient
    if missing := {name for name in info["missing_keys"] if not name.endswith(OPTIONAL_WEIGHT)}:
        raise ValueError(f"{part} {name}: the checkpoint lacks weights: {sorted(missing)[:5]}")
    setattr(config, f"{part}_revision", revision)
    if part == "decoder" or not family_of(base).has_ctc_head(base):
        return model, None
    head = None
    if config.ctc_alphabet and config.ctc_direct is None:
        head = read_ctc_head(model, config.ctc_alphabet, name, revision=revision, **hub)
    return model.base_model, head


def check_attention(attention: str | None) -> None:
    """Refuse attention implementations that cannot apply our masks, such as FlashAttention.

    Raises:
        ValueError: if it is not None (transformers' default, SDPA), sdpa or eager.
    """
    if attention not in (None, "sdpa", "eager"):
        raise ValueError(f"attn_implementation must be null, sdpa or eager, not {attention!r}")


def cast_base(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast the frozen weights of a base model in place; None leaves them unchanged.

    `Module.to` would also round the rotary frequencies and the LoRA weights.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if dtype and tensor.is_floating_point() and not is_trained(name):
            tensor.data = tensor.data.to(dtype)


def load_weights(path: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name.

    Raises:
        OSError: if the file is damaged or is not a safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        remedy = "download it again (`git lfs pull` if it is a Git LFS pointer)"
        raise OSError(f"{path} is not a valid weights file ({error}): {remedy}") from error


def shard_like(tensor: Tensor, target: Tensor) -> Tensor:
    """Shard a full tensor like `target`; return it unchanged if `target` is not sharded."""
    if not isinstance(target, DTensor):
        return tensor
    full = tensor.to(target.device, target.dtype)
    return distribute_tensor(full, target.device_mesh, target.placements)


def is_trained(name: str) -> bool:
    """Tell whether a parameter is trained, and therefore saved in every checkpoint."""
    return name.startswith(("projector.", "ctc.", "characters.", "residual.")) or ".lora_" in name


def add_lora(module: nn.Module, settings: Any, part: str) -> None:
    """Add LoRA (Hu et al. 2021, arXiv 2106.09685) to the named modules of `module`, in place.

    LoRA weights are float32 for every dtype of the base model. In bfloat16, rounding would erase
    most updates of a small learning rate.

    Raises:
        ValueError: if a target matches no module.
    """
    if not settings["r"]:
        return
    leaves = {name.rsplit(".", 1)[-1] for name, _ in module.named_modules()}
    for target in settings["target_modules"]:
        if target not in leaves:
            raise ValueError(f"{part} LoRA target {target!r} matches no module of the {part}")
    inject_adapter_in_model(LoraConfig(**settings), module)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
