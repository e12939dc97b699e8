"""`tiny-audio plan +experiments=stage1 gpu=a40 price=0.50 hours=24`: the cost before the run.

Counts a step of each stage from the configs alone, without weights or data, and says what it needs
in work, memory, time and money. Arguments are those of src/train.py, and:

  gpu=a40           which one: see the table that this prints
  price=0.50        dollars an hour
  hours=24          what so many hours buy; or budget=12, dollars
  utilisation=0.4   share of the peak that training reaches: an assumption, unless --measure
  seconds=8.4       length of a clip
  text_rate=3       transcript tokens a second of audio
  margin=0.1        share of the memory left to the driver and to fragmentation

A vocabulary of the data is not known here: the CTC head is counted with the decoder's whole one.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig

from ..asr_config import ASRConfig, check_keys
from ..asr_modeling import ASRModel
from ..hub import one_line
from ..plan import GPUS, PARTS, Cost, count, gpu_of, without_weights
from ..train import CONFIGS, check_config, lora_from, part_of, part_rates, run_stage

OWN = {
    "gpu": "a40", "price": None, "hours": None, "budget": None, "utilisation": 0.4,
    "seconds": 8.4, "text_rate": 3.0, "margin": 0.1,
}  # fmt: skip
LETTERS = 40  # classes of a character head; English has 28
CHANGES = {
    "frozen encoder": ["encoder_lora.r=0"],
    "no gradient checkpointing": ["training.gradient_checkpointing=false"],
}
RECIPES = ("stage1", "archive/lora_decoder", "parakeet", "quickstart", "mac_minimal")


@dataclass
class Stage:
    """A stage of a recipe: its cost, and the audio in seconds that a step takes."""

    name: str
    steps: int
    audio: float
    clips: int
    cost: Cost
    model: ASRModel
    cfg: Any

    @property
    def gflop(self) -> float:
        """For a second of audio."""
        return sum(self.cost.gflop.values())

    @property
    def gigabytes(self) -> float:
        """At the fullest moment."""
        return sum(self.cost.memory.values()) / 1e9

    def hours(self, rate: float) -> float:
        """That the stage takes at `rate` GFLOP/s."""
        return self.steps * self.audio * self.gflop / rate / 3600


def stage_config(overrides: Sequence[str], index: int) -> Any:
    """The config of a recipe's stage, as `train.run_stage` takes it; -1 is the last."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("config", list(overrides))
    check_config(cfg)
    stage = cfg.stages[index]
    merged: Any = OmegaConf.merge(cfg, {k: stage[k] for k in ("training", "data") if stage.get(k)})
    merged.stages = [stage]
    return merged


def plan_stage(cfg: Any, own: dict[str, Any]) -> Stage:
    """Count one stage.

    Raises:
        OSError: when a base model's config is not found; only that file is read.
    """
    model = cfg.model
    bases: list[Any] = []
    for part in ("encoder", "decoder"):
        name, revision = model[f"{part}_model_name"], model[f"{part}_revision"]
        try:
            bases.append(AutoConfig.from_pretrained(name, revision=revision))
        except OSError as error:
            raise OSError(f"no config of the {part} {name}: {one_line(error)}") from error
    text = bases[1]
    config = ASRConfig(
        audio_config=vars(bases[0]).get("encoder_config", bases[0]),
        text_config=text,
        encoder_lora=lora_from(cfg.encoder_lora),
        decoder_lora=lora_from(cfg.peft, cfg.peft.peft_method),
        ctc_token_ids=list(range(text.vocab_size)) if model.ctc else [],
        ctc_alphabet=list(range(LETTERS)) if model.ctc_characters else [],
        **{k: model[k] for k in ("stack", "projector_hidden", "bridge", "ctc_hidden")},
    )
    settings: Any = OmegaConf.to_container(cfg.training, resolve=True)
    twin = without_weights(config, settings["dtype"] and getattr(torch, settings["dtype"]))
    rates = part_rates(settings, settings["learning_rate"])
    for name, parameter in twin.named_parameters():
        if not rates[part_of(name)]:
            parameter.requires_grad_(False)
    seconds = own["seconds"]
    most = settings["per_device_train_batch_size"] or 10**9
    clips = max(1, min(most, int(settings["batch_seconds"] / seconds)))
    cost = count(twin, settings, seconds, round(own["text_rate"] * seconds), clips)
    audio = clips * seconds * settings["gradient_accumulation_steps"]
    name = cfg.stages[0].name
    return Stage(name, settings["max_steps"], audio, clips, cost, twin, cfg)


def plan(overrides: Sequence[str], own: dict[str, Any]) -> list[Stage]:
    """Every stage of a recipe."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        stages = len(compose("config", list(overrides)).stages)
    return [plan_stage(stage_config(overrides, i), own) for i in range(stages)]


def measure(stage: Stage, steps: int = 12) -> float:
    """GFLOP/s of real steps of a stage, its real weights and data, on the device at hand."""
    cfg = OmegaConf.merge(stage.cfg, {"training": {"max_steps": steps, "logging_steps": 1}})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / stage.name
        run_stage(cfg, folder, None)  # type: ignore[arg-type]
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return stage.gflop * median(row["audio_seconds_per_second"] for row in rows[3:])


def report(stages: list[Stage], overrides: Sequence[str], own: dict[str, Any], rate: float) -> None:
    """Print everything; `rate` is in GFLOP/s."""
    gpu, price = GPUS[own["gpu"]], own["price"]
    main = max(stages, key=lambda stage: stage.hours(rate))

    def dollars(hours: float) -> str:
        return "" if price is None else f"  ${hours * price:,.2f}"

    print(f"\n{'parameters':<12}{'total':>16}{'trained':>14}")
    for part, module in main.model.named_children():
        total = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        print(f"{part:<12}{total:>16,}{trained:>14,}")
    print("\nGFLOP for a second of audio, forward and backward")
    print(f"{'stage':<12}" + "".join(f"{part:>11}" for part in (*PARTS, "all")))
    for stage in stages:
        figures = [*(stage.cost.gflop[part] for part in PARTS), stage.gflop]
        print(f"{stage.name:<12}" + "".join(f"{figure:>11.1f}" for figure in figures))
    print(f"\n{'stage':<12}{'steps':>9}{'audio h':>9}{'hours':>8}{'memory':>11}")
    for stage in stages:
        print(
            f"{stage.name:<12}{stage.steps:>9,}{stage.steps * stage.audio / 3600:>9.0f}"
            f"{stage.hours(rate):>8.1f}{stage.gigabytes:>8.1f} GB{dollars(stage.hours(rate))}"
        )
    hours = sum(stage.hours(rate) for stage in stages)
    print(f"{'all':<12}{'':>18}{hours:>8.1f}{'':>11}{dollars(hours)}")
    memory = " + ".join(f"{v / 1e9:.1f} {k}" for k, v in main.cost.memory.items() if v > 5e7)
    room = gpu["memory"] * (1 - own["margin"])
    full = max(stage.gigabytes for stage in stages)
    print(f"\nmemory of {main.name}, {main.clips} clips of {own['seconds']:g} s: {memory} GB")
    verdict = "fits" if full <= room else "does NOT fit"
    print(f"{full:.1f} GB at most: {verdict} in {room:.1f} of {gpu['memory']} GB")
    bought = own["hours"] or (own["budget"] and own["budget"] / price)
    if bought:
        heard, cash = bought * rate / main.gflop, dollars(bought).strip()
        cost = f"{bought:g} hours ({cash})" if cash else f"{bought:g} hours"
        print(
            f"{cost} buy {heard:,.0f} hours of audio in stage {main.name}, "
            f"{heard * 3600 / main.audio:,.0f} steps"
        )
    print("\nthe same on other GPUs at the same utilisation")
    print(f"{'':<12}{'TFLOP/s':>8}{'GB':>5}{'fits':>6}{'hours':>8}  costs the same at")
    for name, other in GPUS.items():
        fits = "yes" if full <= other["memory"] * (1 - own["margin"]) else "no"
        takes = hours * gpu["tflops"] / other["tflops"]
        equal = "" if price is None else f"  ${price * hours / takes:.2f} an hour"
        print(f"{name:<12}{other['tflops']:>8}{other['memory']:>5}{fits:>6}{takes:>8.1f}{equal}")
    print(f"\nwhat a change of stage {main.name} buys")
    index = stages.index(main)
    for name, change in CHANGES.items():
        changed = stage_config([*overrides, *change], index)
        if changed != main.cfg:
            stage = plan_stage(changed, own)
            more = 100 * (main.gflop / stage.gflop - 1)
            print(f"{name:<34}{more:>+5.0f} % audio{stage.gigabytes:>8.1f} GB  {' '.join(change)}")


def recipes(own: dict[str, Any], rate: float) -> None:
    """Print a line for each shipped recipe."""
    print(f"\n{'recipe':<22}{'GFLOP/audio s':>14}{'memory':>11}{'audio h in a GPU hour':>23}")
    for name in RECIPES:
        try:
            stage = plan([f"+experiments={name}"], own)[-1]
        except OSError as error:
            print(f"{name:<22}{error}")
            continue
        figures = f"{stage.gflop:>14.1f}{stage.gigabytes:>8.1f} GB{rate / stage.gflop:>23.0f}"
        print(f"{name:<22}{figures}")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; what is wrong is one line."""
    parser = argparse.ArgumentParser(
        prog="tiny-audio plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measure", action="store_true", help="12 real steps instead of a guess")
    parser.add_argument("--recipes", action="store_true", help="a table of the shipped recipes too")
    parser.add_argument("arguments", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    own, overrides = dict(OWN), []
    try:
        for argument in args.arguments:
            key, _, value = argument.partition("=")
            if key not in OWN:
                overrides.append(argument)
            else:
                own[key] = value if key == "gpu" else float(value)
        check_keys([own["gpu"]], GPUS, "the list of GPUs")
        if own["budget"] and not own["price"]:
            raise ValueError("budget= needs price=, dollars an hour")
        stages = plan(overrides, own)
        gpu = GPUS[own["gpu"]]
        rate, how = gpu["tflops"] * 1e3 * own["utilisation"], f"{own['utilisation']:.0%} of peak"
        if args.measure:
            rate = measure(stages[-1])
            here = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
            how = f"measured here ({here}): {rate:,.0f} GFLOP/s"
            if known := gpu_of(here):
                share = rate / GPUS[known]["tflops"] / 1e3
                rate, how = gpu["tflops"] * 1e3 * share, f"{how}, {share:.1%} of peak"
        print(
            f"{' '.join(overrides)} on {own['gpu']} ({gpu['tflops']} TFLOP/s, {gpu['memory']} GB), "
            f"{how}; clips of {own['seconds']:g} s, {own['text_rate']:g} tokens a second"
        )
        report(stages, overrides, own, rate)
        if args.recipes:
            recipes(own, rate)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
