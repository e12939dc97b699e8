"""`tiny-audio data check +experiments=quickstart`: check a recipe's data before a paid run.

Reads and decodes every clip of the recipe's sources, applies the checks of training, and prints a
table. Arguments are those of src/train.py. `data.max_train_samples=1000` checks only the first
1,000 clips of each source, streams included. `data_check.jsonl` in the run's folder lists each clip
that training would drop, with the reason. The exit code is 1 if the recipe would not train.
"""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..training.batches import LengthBatchSampler
from ..training.build import build_processor
from ..training.checks import Dropped
from ..training.data import Clips
from ..training.train import limits, read_data
from ..training.vocabulary import read_counts
from . import parser_of
from .plan import recipe_stages


def check_source(clips: Clips, source: Any, streaming: bool) -> None:
    """Read and check one source, and print its rows of the table."""
    dropped_before, rewritten_before = clips.dropped.counts.copy(), clips.rewritten
    total_before, started, seconds = clips.total, time.monotonic(), list[float]()
    speakers, characters = set[str | None](), set[str]()
    for example in islice(clips.admitted(source, streaming), clips.max_train_samples):
        item = clips.read(example)
        if "features" not in item:
            clips.dropped.add(**item)
            continue
        seconds.append(example.duration)
        speakers.add(example.speaker)
        characters |= set(example.text)
    reasons, read = clips.dropped.counts - dropped_before, clips.total - total_before
    rate = read / (time.monotonic() - started)
    named = len(speakers - {None}) or "-"
    print(
        f"{len(seconds):>9,}{sum(seconds) / 3600:>9.2f}{reasons.total():>9,}"
        f"{clips.rewritten - rewritten_before:>11,}{named:>10}{rate:>9.0f}  {source['path']}"
    )
    print(f"{'':<9}characters: {''.join(sorted(characters))}")
    for reason, count in reasons.items():
        print(f"{'':<9}{count:,} {reason}, first {clips.dropped.first[reason]}")


def check(cfgs: Sequence[Any]) -> None:
    """Check the data of the first stage, and the batches of every stage.

    Raises:
        DataError: if training would refuse the data.
    """
    cfg = cfgs[0]
    folder = Path(cfg.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "data_check.jsonl"
    processor, dropped = build_processor(cfg), Dropped(report, cfg.data.max_dropped_fraction)
    most = cfg.data.max_train_samples
    clips = Clips(processor, dropped, max_train_samples=most, **limits(cfg))
    if cfg.data.words and cfg.model.ctc_characters:  # training reads it for the search
        read_counts(Path(cfg.data.words).expanduser())
    print(f"{'clips':>9}{'hours':>9}{'dropped':>9}{'rewritten':>11}{'speakers':>10}{'clips/s':>9}")
    for source in cfg.data.train:
        check_source(clips, source, cfg.data.streaming)
    print(f"dropped clips are named in {report}" if dropped.counts else "no clip is dropped")
    dropped.check(clips.total)
    for stage in cfgs:  # read the data as training does
        settings: Any = OmegaConf.to_container(stage.training, resolve=True)
        data, _ = read_data(stage, settings, processor, Dropped(None, dropped.allowed))
        if not stage.data.streaming:
            seconds = data.lengths(0)
            batches = LengthBatchSampler(seconds, settings["batch_seconds"])
            padded = sum(len(batch) * max(seconds[i] for i in batch) for batch in batches)
            print(
                f"stage {stage.stages[0].name}: {len(batches):,} batches an epoch, "
                f"{1 - sum(seconds) / padded:.1%} of the audio is padding"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Check the data."""
    parser = parser_of("tiny-audio data", __doc__)
    parser.add_argument("action", choices=["check"])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    check(recipe_stages(args.overrides))
    return 0
