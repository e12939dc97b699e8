"""The base models: how they are loaded, and the LoRA that is put into them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from .asr_config import ASRConfig
from .asr_encoder import encoder_class, has_ctc_head, read_ctc_head

# Parameters that a checkpoint of the base model may lack: used only by SpecAugment in training.
MAY_BE_MISSING = {"masked_spec_embed", "encoder.masked_spec_embed"}


def load_base(
    config: ASRConfig, part: str, dtype: torch.dtype | None, **kwargs: Any
) -> tuple[Any, tuple[Tensor, Tensor] | None]:
    """One of the base models that `config` names; the commit that was resolved is written into it.

    Args:
        config: names the models.
        part: "encoder" or "decoder".
        dtype: of the weights, float32 by default.
        kwargs: `attn_implementation`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The model, and the CTC head that it brings, see `read_ctc_head`, where there is one and the
        character head is not trained yet.

    Raises:
        OSError: when it is not found.
        ValueError: when it lacks weights.
    """
    where = {k: v for k, v in kwargs.items() if k != "attn_implementation"}
    name, revision = getattr(config, f"{part}_name"), getattr(config, f"{part}_revision")
    kind: Any = AutoModelForCausalLM
    base, extra, head = None, dict[str, Any](), None
    file = Path(str(cached_file(name, "config.json", revision=revision, **where)))
    if file.parts[-3:-2] == ("snapshots",):  # the Hub's cache: the folder is the commit
        revision = file.parts[-2]
    if part == "encoder":
        base = AutoConfig.from_pretrained(name, revision=revision, **where)
        kind, extra = encoder_class(base)
    options = {"dtype": dtype or torch.float32, "output_loading_info": True, **extra, **kwargs}
    attention = options.pop("attn_implementation", None)
    model, info = kind.from_pretrained(name, revision=revision, **options)
    choose_attention(model, attention)
    if "layerdrop" in vars(model.config):
        model.config.layerdrop = 0.0  # a dropped layer's LoRA has no gradient: DDP would fail
    if missing := set(info["missing_keys"]) - MAY_BE_MISSING:
        raise ValueError(f"{part} {name} lacks weights: {sorted(missing)[:5]}")
    setattr(config, f"{part}_revision", revision)
    if base is None or not has_ctc_head(base):
        return model, None
    if config.ctc_alphabet and config.ctc_direct is None:
        head = read_ctc_head(model, config.ctc_alphabet, name, revision=revision, **where)
    return model.base_model, head


def choose_attention(model: Any, attention: str | None) -> None:
    """Switch a base model to an attention implementation, None being transformers' choice.

    FlashAttention is left out where the family does not support it (Parakeet, WavLM).
    """
    if attention and ("flash" not in attention or model._supports_flash_attn):
        model.set_attn_implementation(attention)


def cast_base(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Put a base model's weights into a dtype, None leaving them as they are.

    `Module.to` would round the rotary frequencies and the LoRA too.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if dtype and tensor.is_floating_point() and not is_trained(name):
            tensor.data = tensor.data.to(dtype)


def load_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        OSError: when it is damaged, or not what its name says.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        again = "fetch it again (`git lfs pull`, where Git LFS left a pointer)"
        raise OSError(f"{path} holds no whole weights ({error}): {again}") from error


def shared_as(tensor: Tensor, place: Tensor) -> Tensor:
    """A whole tensor, cut into the shards that `place` has, if it has any."""
    if not isinstance(place, DTensor):
        return tensor
    whole = tensor.to(place.device, place.dtype)
    return distribute_tensor(whole, place.device_mesh, place.placements)


def is_trained(name: str) -> bool:
    """Whether a parameter of this name is trained, and so belongs in every checkpoint."""
    return name.startswith(("projector.", "ctc.", "characters.", "residual.")) or ".lora_" in name


def add_lora(module: nn.Module, settings: Any, part: str) -> None:
    """Put LoRA (Hu et al. 2021, arXiv 2106.09685) on the named modules of `module`, in place.

    Its weights are float32 whatever the base model's dtype is: in bfloat16 most updates of a small
    learning rate would be rounded away.

    Raises:
        ValueError: when a target matches no module.
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
