"""`tiny-audio plan +experiments=stage1 gpu=a40 price=0.50 hours=24`: estimate the cost of a run.

Counts one step of each stage from the configs alone, without weights or data. Prints the work,
memory, time and money that the recipe needs. Arguments are those of src/train.py, and:

  gpu=a40           the GPU; the printed table lists all of them
  price=0.50        dollars per hour
  hours=24          also print how many steps this time buys
  utilisation=0.4   share of the peak that training reaches (default: as measured on that GPU, see
                    gpus.yaml, or assumed to be 0.4); training prints the real one
  seconds=8.4       length of a clip
  text_rate=3       transcript tokens per second of audio

The vocabulary of the data is unknown here, so the CTC head is counted with all decoder tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig

from ..asr.asr_config import check_keys
from ..asr.asr_encoder import encoder_config
from ..asr.asr_modeling import ASRModel
from ..errors import one_line
from ..training.build import model_config
from ..training.parts import freeze_idle
from ..training.plan import GPUS, PARTS, Cost, count, describe, table, without_weights
from ..training.recipe import compose_recipe, stage_configs
from . import parser_of

OWN: dict[str, Any] = {"gpu": "a40", "price": None, "hours": None}
OWN |= {"utilisation": None, "seconds": 8.4, "text_rate": 3.0}
ASSUMED = 0.4  # utilisation of a GPU on which nothing was measured
MARGIN = 0.1  # share of the memory left for the driver and fragmentation
LETTERS = 40  # classes of a character head; English has 28


@dataclass
class Stage:
    """A counted stage of a recipe.

    Attributes:
        cfg: the stage's config.
        model: the model on the meta device.
        cost: the cost of a step.
        clips: clips in a step.
        gflop: GFLOP per second of audio.
        gb: peak memory in GB.
        audio: hours of audio over all steps.
    """

    cfg: Any
    model: ASRModel
    cost: Cost
    clips: int
    gflop: float
    gb: float
    audio: float


def recipe_stages(overrides: Sequence[str]) -> list[Any]:
    """The config of each stage of a recipe; `stages` contains only that stage."""
    cfg = compose_recipe(overrides)
    return [
        OmegaConf.merge(merged, {"stages": [stage]})
        for merged, stage in zip(stage_configs(cfg), cfg.stages, strict=True)
    ]


def plan_stage(cfg: Any, own: dict[str, Any]) -> Stage:
    """Estimate the work and memory of one stage from the configs of its base models.

    Raises:
        OSError: if the config of a base model is not found.
    """
    if cfg.training.max_steps <= 0:
        raise ValueError("plan needs training.max_steps: only the data says how long an epoch is")
    bases: list[Any] = []
    for part in ("encoder", "decoder"):
        name = cfg.model[f"{part}_model_name"]
        try:
            revision = cfg.model[f"{part}_revision"]
            bases.append(AutoConfig.from_pretrained(name, revision=revision))
        except OSError as error:
            raise OSError(f"no config of the {part} {name}: {one_line(error)}") from error
    encoder, decoder = encoder_config(bases[0]), bases[1]
    tokens = list(range(decoder.vocab_size)) if cfg.model.ctc else []
    alphabet = list(range(LETTERS)) if cfg.model.ctc_characters else []
    config = model_config(cfg, tokens, alphabet, audio_config=encoder, text_config=decoder)
    settings: Any = OmegaConf.to_container(cfg.training, resolve=True)
    meta = without_weights(config, settings["dtype"] and getattr(torch, settings["dtype"]))
    freeze_idle(meta, settings)
    seconds = own["seconds"]
    clips = int(settings["batch_seconds"] / (seconds + cfg.model.tail_seconds))
    clips = max(1, min(clips, settings["per_device_train_batch_size"] or clips))
    cost = count(meta, settings, seconds, round(own["text_rate"] * seconds), clips)
    steps = settings["max_steps"] * settings["gradient_accumulation_steps"]
    gflop, gb = sum(cost.gflop.values()), sum(cost.memory.values()) / 1e9
    return Stage(cfg, meta, cost, clips, gflop, gb, steps * clips * seconds / 3600)


def utilisation(gpu: str, given: float | None) -> tuple[float, str]:
    """Return the share of a GPU's peak that training reaches, and where the figure comes from."""
    if given:
        return given, "given"
    if found := GPUS[gpu].get("measured"):
        return found["utilisation"], f"measured {found['date']}"
    return ASSUMED, "assumed"


def report(own: dict[str, Any], stages: list[Stage]) -> None:
    """Print the needs of the stages, their time and price on `own["gpu"]`, and on other GPUs."""
    gpu, price = GPUS[own["gpu"]], own["price"]
    shares = {name: utilisation(name, own["utilisation"]) for name in GPUS}
    rates = {name: 1e3 * GPUS[name]["tflops"] * shares[name][0] for name in GPUS}  # GFLOP/s
    rate = rates[own["gpu"]]
    hours = [stage.audio * stage.gflop / rate for stage in stages]
    longest = hours.index(max(hours))
    main_stage, largest = stages[longest], max(stages, key=lambda stage: stage.gb)

    def dollars(hours: float) -> str:
        return "" if price is None else f"${hours * price:,.2f}"

    def fits(memory: float) -> str:
        return "fits" if largest.gb <= memory * (1 - MARGIN) else "too big"

    print(f"\n{describe(main_stage.model)}\n\nGFLOP for a second of audio, forward and backward")
    work, bill = [["stage", *PARTS, "all"]], [["stage", "steps", "audio h", "hours", "GB", ""]]
    for stage, takes in zip(stages, hours, strict=True):
        name, steps = stage.cfg.stages[0].name, stage.cfg.training.max_steps
        figures = [*(stage.cost.gflop[part] for part in PARTS), stage.gflop]
        work.append([name, *(f"{figure:.1f}" for figure in figures)])
        needs = [f"{steps:,}", f"{stage.audio:.0f}", f"{takes:.1f}", f"{stage.gb:.1f}"]
        bill.append([name, *needs, dollars(takes)])
    bill.append(["all", "", "", f"{sum(hours):.1f}", "", dollars(sum(hours))])
    print(f"{table(*work)}\n\n{table(*bill)}\n")
    parts = [f"{n / 1e9:.1f} {part}" for part, n in largest.cost.memory.items() if n > 5e7]
    clips = f"{largest.clips} clips of {own['seconds']:g} s"
    print(f"memory with {clips}: {' + '.join(parts)} = {largest.gb:.1f} GB,")
    print(f"of {gpu['memory']} GB, {MARGIN:.0%} left to driver and gaps: {fits(gpu['memory'])}")
    if bought := own["hours"]:
        audio = bought * rate / main_stage.gflop
        steps = audio / main_stage.audio * main_stage.cfg.training.max_steps
        print(f"{bought:g} hours {dollars(bought)} buy {steps:,.0f} steps, {audio:,.0f} h of audio")
    rows = [["GPU", "TFLOP/s", "of it", "", "GB", "", "hours"]]
    rows[0] += ["costs the same at"] if price else []
    for name, other in GPUS.items():
        faster, (share, source) = rates[name] / rate, shares[name]
        row = [name, f"{other['tflops']:g}", f"{share:.0%}", source]
        row += [str(other["memory"]), fits(other["memory"]), f"{sum(hours) / faster:.1f}"]
        rows.append([*row, f"{dollars(faster)} an hour"] if price else row)
    print(f"\n{table(*rows)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan."""
    parser = parser_of("tiny-audio plan", __doc__)
    parser.add_argument("arguments", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    own, overrides = dict(OWN), []
    for argument in args.arguments:
        key, _, value = argument.partition("=")
        if key not in OWN:
            overrides.append(argument)
        else:
            own[key] = value if key == "gpu" else float(value)
    if min(v for v in own.values() if isinstance(v, float)) <= 0 or (own["utilisation"] or 0) > 1:
        raise ValueError(f"{', '.join(OWN)}: must be above 0, and utilisation at most 1")
    check_keys([own["gpu"]], GPUS, "the list of GPUs")
    stages = [plan_stage(cfg, own) for cfg in recipe_stages(overrides)]
    share, source = utilisation(own["gpu"], own["utilisation"])
    print(f"{' '.join(overrides)} on {own['gpu']}, {share:.0%} of its peak ({source})")
    print(f"clips of {own['seconds']:g} s, {own['text_rate']:g} tokens a second")
    report(own, stages)
    return 0
