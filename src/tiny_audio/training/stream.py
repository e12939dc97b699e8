"""Streaming data, for sources too large for the disk; resumable at any batch.

The stream reads a block of examples, sorts it, cuts it into batches of similar length, and shuffles
the batches. Each batch carries the position after it: the state of the sources at the start of the
block, and the number of batches emitted since. A resumed run therefore reads only one block again.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import BatchFeature

from ..asr.asr_processing import ASRProcessor
from .batches import cut_batches
from .checks import Dropped
from .data import Clips
from .manifests import DataError, Example, Reader

# `seen`: examples read so far in the first epoch; from the second on, those of a whole epoch.
START: dict[str, Any] = {"epoch": 0, "block": 0, "emitted": 0, "sources": None, "seen": 0}


class SpeechStream(Clips, IterableDataset):
    """An endless iterator of batches; each epoch contains every example once.

    `start` is the position of the first batch. A batch's `position` is that of the next batch.

    Args:
        sources: see `manifests.SOURCE`; mixed by their `weight` until all are exhausted.
        batch_seconds: maximum padded seconds of audio in a batch.
        block: number of examples that are sorted and shuffled together.
        most: maximum number of clips in a batch.
        rank, world: this process and the number of processes; each reads its own share.
        threads: number of threads that decode audio.
        options: see `Clips`.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        processor: ASRProcessor,
        dropped: Dropped,
        batch_seconds: float,
        block: int = 2000,
        most: int | None = None,
        rank: int = 0,
        world: int = 1,
        threads: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(processor, dropped, **options)
        if self.max_train_samples:
            self.max_train_samples = math.ceil(self.max_train_samples / world)
        if self.max_seconds + processor.tail_seconds > batch_seconds:
            raise DataError(
                f"training.batch_seconds={batch_seconds} is shorter than data.max_seconds="
                f"{self.max_seconds} + model.tail_seconds={processor.tail_seconds}"
            )
        self.sources, self.start = sources, START
        self.batch_seconds, self.block, self.most = batch_seconds, block, most or block
        self.rank, self.world, self.threads = rank, world, threads
        for reader in self.open(START):  # report a wrong column here instead of in a worker
            if reader.source["weight"] <= 0:
                raise DataError(f"{reader.source['path']}: weight must be above 0")

    def texts(self, count: int) -> Iterator[Example]:
        """Yield at most `count` examples without audio, to build the vocabulary from.

        Each source gives an equal share.
        """
        for source in self.sources:
            reader = Reader(source, streaming=True)  # no sharing: all processes need the same
            for text in reader.texts(count // len(self.sources)):
                example = Example("", None, text, duration=1.0)
                self.admit(example)
                if example.text:
                    yield example

    def __iter__(self) -> Iterator[BatchFeature]:
        position = {**START, **self.start}
        dropped: list[dict[str, Any]] = []  # sent with the next batch: this may be a worker
        readers = self.open(position)
        useful = position["block"] or position["emitted"]  # whether this epoch yielded a batch
        with ThreadPoolExecutor(self.threads) as pool:
            while True:
                self.set_epoch(position["epoch"])
                examples = self.read_block(readers, position, dropped)
                following = self.following(readers, position)
                batches = self.batches(examples, position)
                for i in range(position["emitted"], len(batches)):
                    items = list(pool.map(self.read, [examples[j] for j in batches[i]]))
                    position["emitted"] = i + 1
                    dropped += [item for item in items if "features" not in item]
                    if good := [item for item in items if "features" in item]:
                        batch, useful = self.collate(good), True
                        batch["dropped"], dropped = dropped, []
                        batch["position"] = {**position} if i + 1 < len(batches) else following
                        yield batch
                if following["epoch"] > position["epoch"]:
                    if not useful:
                        paths = [reader.source["path"] for reader in readers]
                        raise DataError(f"no usable example in {paths}: {dropped[:3]}")
                    readers, useful = self.open(following), False
                position = {**following}

    def open(self, position: dict[str, Any]) -> list[Reader]:
        """Open the sources at a position."""
        states = position["sources"] or [None] * len(self.sources)
        return [
            Reader(source, True, state, self.rank, self.world, (self.seed, position["epoch"]))
            for source, state in zip(self.sources, states, strict=True)
        ]

    def read_block(
        self, readers: list[Reader], position: dict[str, Any], dropped: list[dict[str, Any]]
    ) -> list[Example]:
        """Read the usable examples of the block at `position`; append the others to `dropped`."""
        examples: list[Example] = []
        rng = np.random.default_rng([self.seed, position["epoch"], position["block"], 1])
        count = sum(reader.count for reader in readers)
        end = min(count + self.block, self.max_train_samples or float("inf"))
        while count < end and not all(reader.over for reader in readers):
            weights = np.array([r.source["weight"] * (not r.over) for r in readers], float)
            which = int(rng.choice(len(readers), p=weights / weights.sum()))
            example = readers[which].read()
            if example is None:
                continue
            count += 1
            if which:  # keep ids unique across sources
                example.id += f"@{which}"
            if refusal := self.admit(example):
                dropped.append(refusal)
            else:
                examples += self.repeated(example)
        if not position["epoch"]:  # a disturbed clip's repetitions are dropped one by one
            copies = [reader.source["repeat"] if self.disturb else 1 for reader in readers]
            position["seen"] = sum(r.count * n for r, n in zip(readers, copies, strict=True))
        return examples

    def following(self, readers: list[Reader], before: dict[str, Any]) -> dict[str, Any]:
        """The position of the next block, after the block at `before` was read."""
        count = sum(reader.count for reader in readers)
        if all(reader.over for reader in readers) or count == self.max_train_samples:
            return {**START, "epoch": before["epoch"] + 1, "seen": before["seen"]}
        states = [reader.state() for reader in readers]
        return {**before, "block": before["block"] + 1, "emitted": 0, "sources": states}

    def batches(self, examples: list[Example], position: dict[str, Any]) -> list[list[int]]:
        """Cut a block into batches; their order depends only on (seed, epoch, block)."""
        seconds = [self.features_seconds(e, position["epoch"]) for e in examples]
        batches = cut_batches(seconds, self.batch_seconds, self.most)
        np.random.default_rng([self.seed, position["epoch"], position["block"]]).shuffle(batches)
        return batches
