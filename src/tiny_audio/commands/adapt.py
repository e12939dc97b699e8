"""`tiny-audio adapt MODEL --data my.csv`: improve a trained model on recordings of your own.

Holds out some of the clips, trains the character head, a LoRA in the encoder and the words on the
others, and measures the model before and after on the same held-out clips. Clips of the model's old
training data are mixed in, and its old evaluation clips are measured too, because a model that
adapts may forget.
"""

import json
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..asr.asr_config import ASRConfig
from ..asr.asr_encoder import family_of
from ..errors import clean_exit
from ..evaluation.recognisers import fingerprint, load_recogniser, model_files
from ..training.manifests import DataError, Example, Reader, audio_checksum, read_source
from ..training.plan import without_weights
from ..training.recipe import CONFIGS
from ..training.train import train
from . import home_path, parser_of
from .compare import compared, paired, read_rows
from .eval import evaluate

HELD_OUT = 0.2  # share of the clips
MIN_CLIPS, MIN_SPEAKERS = 10, 5  # fewest clips to measure on; fewest speakers to split by
MOST_COPIES, COPIES_SECONDS = 8, 1200.0  # clips are repeated up to this much audio
KEPT_CLIPS = 150  # of each source of the old training data


def hold_out(clips: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Split clips into training and held-out ones.

    With `MIN_SPEAKERS` or more, whole speakers are held out; otherwise all clips of a text.

    Raises:
        DataError: if too few clips would be held out.
    """
    speakers = {clip.speaker for clip in clips}
    by_speaker = len(speakers) >= MIN_SPEAKERS and None not in speakers
    groups: dict[str, list[Example]] = defaultdict(list)
    for clip in clips:
        text = " ".join(clip.text.lower().split())
        groups[str(clip.speaker) if by_speaker else text].append(clip)
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    wanted = HELD_OUT * len(clips)
    held_out, kept = list[Example](), list[Example]()
    for name in names:  # one who speaks most of the clips is not held out
        fits = len(held_out) < wanted and len(held_out) + len(groups[name]) <= 2 * wanted
        (held_out if fits else kept).extend(groups[name])
    if len(held_out) < MIN_CLIPS or not kept:
        kind = "speakers" if by_speaker else "texts"
        raise DataError(
            f"{len(clips)} clips of {len(groups)} {kind} are too few to hold out {MIN_CLIPS}: "
            "record more, or name other clips with --dev"
        )
    return kept, held_out


def write_clips(clips: list[Example], path: Path) -> str:
    """Write a manifest with absolute paths; returns its path.

    Raises:
        DataError: if the audio is inside a table, not in files.
    """
    if any(not isinstance(clip.audio, str) for clip in clips):
        raise DataError("adapt needs a manifest of audio files, not a table that holds the audio")
    rows = [{"id": c.id, "audio": str(Path(c.audio).absolute()), "text": c.text,
             "duration": c.duration} for c in clips]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_of(model: Path) -> DictConfig:
    """Load the recipe that a model was trained with.

    Raises:
        ValueError: if the folder holds none.
    """
    path = model / "training_config.yaml"
    if not path.is_file():
        raise ValueError(f"{model} holds no training_config.yaml: adapt needs a model of ours")
    cfg: Any = OmegaConf.load(path)
    if cfg.peft.pop("peft_method", "lora") is None:  # how older versions wrote peft.r=0
        cfg.peft.r = 0
    return cfg


def existing(sources: Any) -> list[dict[str, Any]]:
    """Keep the data sources of an old recipe that still exist on this machine."""
    named = [{"path": s} if isinstance(s, str) else dict(s) for s in sources or []]
    return [source for source in named if Path(source["path"]).expanduser().exists()]


def adapted_recipe(
    model: Path, own: str, seconds: float, keep: list[dict[str, Any]], args: Any
) -> DictConfig:
    """Change the model's recipe by `experiments/adapt.yaml`, and set its data.

    It trains on the manifest `own` (`seconds` of audio) and on the sources `keep`.
    """
    old, change = recipe_of(model), OmegaConf.load(CONFIGS / "experiments/adapt.yaml")
    assert isinstance(change, DictConfig)
    del change["defaults"]
    if old.encoder_lora.r:  # the model's own LoRA goes on
        del change["encoder_lora"]
    else:
        encoder = without_weights(ASRConfig.from_pretrained(model)).encoder
        kinds = family_of(encoder.config).lora_layers
        names = [name for name, part in encoder.named_modules() if isinstance(part, kinds)]
        change.encoder_lora.target_modules = sorted({name.rsplit(".", 1)[-1] for name in names})
    cfg: Any = OmegaConf.merge(old, change)
    cfg.stages[0].training.update({"max_steps": args.steps, "save_steps": args.steps})
    cfg.run.update({"output_dir": str(args.out / "model"), "seed": args.seed, "fresh": False})
    cfg.model.pretrained_model_path = str(model)
    copies = max(1, min(MOST_COPIES, round(COPIES_SECONDS / max(seconds, 1.0))))
    cfg.data.train = [{"path": own, "repeat": copies}, *keep]
    if cfg.data.words and not Path(cfg.data.words).expanduser().is_file():
        cfg.data.words = None  # the model's own n-gram has these words already
    return cfg


def run(args: Any) -> int:
    """Split, measure, train, measure again and print both; returns the exit code."""
    clips = list(read_source({"path": str(args.data)}))
    kept, held_out = (clips, list(read_source({"path": str(args.dev)}))) if args.dev else (
        hold_out(clips, args.seed))  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    made_from = args.out / "adapt.json"  # the options and clips of this folder's adaptation
    said = [[(c.id, c.text, audio_checksum(c.audio)) for c in part] for part in (kept, held_out)]
    weights = fingerprint(model_files(args.model))
    request = json.dumps([vars(args), weights, said], default=str)
    if made_from.exists() and made_from.read_text() != request:
        raise ValueError(f"{args.out} was made from other clips or options: choose another --out")
    own = write_clips(kept, args.out / "train.jsonl")
    old = recipe_of(args.model)
    keep = [{"path": str(args.keep)}] if args.keep else existing(old.data.train)
    for source in keep:
        Reader(source)  # raises an error now rather than after measuring
    keep = [{**source, "sample": KEPT_CLIPS, "repeat": 1} for source in keep]
    if not keep:
        print("warning: none of the old training data is here: the model may forget (see --keep)")
    sets = {"your held-out clips": held_out}
    for source in existing(old.data.eval):
        name = "/".join(Path(source["path"]).parts[-2:])
        sets[f"old clips ({name})"] = [*read_source(source)]
    cfg = adapted_recipe(args.model, own, sum(c.duration for c in kept), keep, args)

    def measure(recogniser: Any, when: str) -> None:
        for i, examples in enumerate(sets.values()):
            evaluate(recogniser, [replace(e) for e in examples], args.out / f"{when}{i}")

    given = load_recogniser(str(args.model), args.device, args.language)
    made_from.write_text(request)  # from here on, the folder holds results
    measure(given, "before")
    adapted = train(cfg)
    measure(load_recogniser(str(adapted), args.device, args.language), "after")
    print(f"\n{'WER %':<34}{'before':>8}{'after':>8}   difference [95 % interval], p")
    for i, name in enumerate(sets):
        before, after = (read_rows(args.out / f"{when}{i}") for when in ("before", "after"))
        _, (was, now), (low, high, p) = compared(paired(before, after))
        span = f"[{low:+.1f}, {high:+.1f}]"
        print(f"{name:<34}{was:8.1f}{now:8.1f}   {now - was:+.1f} {span}, {p:.4f}")
    print(f"\nthe adapted model is in {adapted}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Adapt a model; an error is one line."""
    parser = parser_of("tiny-audio adapt", __doc__)
    parser.add_argument("model", type=home_path, help="folder of a trained model")
    parser.add_argument("--data", type=home_path, required=True, help="manifest of your clips")
    parser.add_argument("--dev", type=home_path, help="held-out clips; default: a fifth of --data")
    parser.add_argument("--keep", type=home_path, help="old clips to mix in; default: the model's")
    parser.add_argument("--out", type=home_path, default=Path("outputs/adapted"))
    parser.add_argument("--steps", type=int, default=130, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--language", default="en", help="normaliser of the WER; default: en")
    parser.add_argument("--device", help="cpu, cuda or mps; default: the best one available")
    args = parser.parse_args(argv)
    with clean_exit():
        return run(args)
