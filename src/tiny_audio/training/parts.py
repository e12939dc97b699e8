"""The parts of a model in training: learning rates, frozen parts, averages with the start."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..asr.asr_bases import shard_like
from ..asr.asr_saving import WEIGHTS


def part_of(name: str) -> str:
    """The part that sets a parameter's learning rate: encoder, decoder, or projector (the rest)."""
    return name.split(".")[0] if name.startswith(("encoder.", "decoder.")) else "projector"


def part_rates(settings: dict[str, Any], default: float) -> dict[str, float]:
    """Learning rate of each part; null means `learning_rate`. `freeze_idle` freezes those of 0."""
    own = {p: settings[f"{p}_learning_rate"] for p in ("encoder", "decoder")}
    return {"projector": default, **{p: default if r is None else r for p, r in own.items()}}


def freeze_idle(model: Any, settings: dict[str, Any]) -> None:
    """Freeze parts with a learning rate of 0, and heads that none of the stage's losses use."""
    rates = part_rates(settings, settings["learning_rate"])
    decoded, posteriors = settings["decoder_loss_weight"], model.config.bridge == "posteriors"
    idle = {"characters": not settings["character_loss_weight"], "residual": not decoded}
    idle["ctc"] = not settings["ctc_loss_weight"] and not (posteriors and decoded)
    idle["projector"] = not settings["ctc_loss_weight"] and not decoded
    for name, parameter in model.named_parameters():
        if not rates[part_of(name)] or idle.get(name.split(".")[0]):
            parameter.requires_grad_(False)


def keep_new_letters(tensors: dict[str, torch.Tensor], model: Any) -> None:
    """Append freshly initialised rows for new letters to a saved character head, in place."""
    for name, fresh in model.state_dict().items():
        if name.startswith(("characters.output.", "characters.direct.")) and name in tensors:
            known = tensors[name]
            tensors[name] = torch.cat([known, fresh[len(known) :].to(known.dtype)])


def average_with_start(model: Any, start: str, share: float) -> None:
    """Average the trained weights with those that the stage started with, in place.

    The model then forgets less of what it knew (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903).

    Args:
        model: the model at the end of the stage.
        start: folder of the model at its beginning; a LoRA that it lacks started at zero.
        share: weight of the start, from 0 to 1.
    """
    before = load_file(Path(start) / WEIGHTS, device=str(model.device))
    keep_new_letters(before, model)
    for name, weights in model.named_parameters():
        if weights.requires_grad and name in before:
            weights.data.lerp_(shard_like(before[name].to(weights.dtype), weights), share)
        elif weights.requires_grad and ".lora_B" in name:
            weights.data.mul_(1 - share)
