"""Data that is too much for a disk: sources read as they come, resumable at any batch.

A block of examples is read, sorted and cut into batches of similar length, as for data that is all
there; the batches of a block are shuffled. Each batch carries the position behind it (where the
sources stood at the block's start, and how many of its batches are out), so a resumed run reads one
block again and nothing else.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset
from transformers import BatchFeature

from .asr_processing import ASRProcessor
from .data import Clips, DataError, Dropped, Example, complete, cut_batches, open_rows, to_example

START: dict[str, Any] = {"epoch": 0, "block": 0, "emitted": 0, "sources": None}


class SpeechStream(Clips, IterableDataset):
    """An endless iterator of batches. Every example is seen once an epoch.

    Args:
        sources: see `data.SOURCE`; they are mixed by their `weight` until all are at their end.
        batch_seconds: padded seconds of audio in a batch.
        block: examples that are sorted and shuffled together.
        most: clips in a batch.
        rank, world: of this process; each reads its own share.
        threads: that decode audio.
        options: see `Clips`.

    `start` is the position of the first batch; a batch's `position` is that of the next one.
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
        if self.max_seconds > batch_seconds:
            raise DataError(
                f"training.batch_seconds={batch_seconds} is below data.max_seconds="
                f"{self.max_seconds}"
            )
        self.sources = [complete(source) for source in sources]
        self.batch_seconds, self.block, self.most = batch_seconds, block, most or block
        self.rank, self.world, self.threads = rank, world, threads
        self.start = START
        for source in self.sources:  # a wrong column is said now, not in a worker
            open_rows(source, streaming=True)

    def texts(self, count: int) -> Iterator[Example]:
        """The first `count` examples without their audio: what the vocabulary is made of."""
        for source in self.sources:
            rows, folder = open_rows(source, streaming=True)
            column, keep = source["text_column"], count // len(self.sources)
            for i, row in enumerate(rows.select_columns([column]).take(keep)):
                example = to_example(
                    {**source, "duration_column": "duration"},
                    {column: row[column], source["audio_column"]: None, "duration": 1.0},
                    i,
                    folder,
                )
                self.admit(example)
                if example.text:
                    yield example

    def __iter__(self) -> Iterator[BatchFeature]:
        position, dropped = {**self.start}, []  # this may be a worker: the trainer counts them
        feed = Feed(self, position)
        with ThreadPoolExecutor(self.threads) as pool:
            while True:
                self.set_epoch(position["epoch"])
                examples = feed.read(position, dropped)
                following = feed.position(position)
                batches = self.batches(examples, position)
                for i in range(position["emitted"], len(batches)):
                    items = list(pool.map(self.read, [examples[j] for j in batches[i]]))
                    position["emitted"] = i + 1
                    dropped += [item for item in items if "features" not in item]
                    if good := [item for item in items if "features" in item]:
                        batch = self.collate(good)
                        batch["dropped"], dropped = dropped, []
                        last = i + 1 == len(batches)
                        batch["position"] = following if last else {**position}
                        yield batch
                if following["epoch"] > position["epoch"]:
                    feed = Feed(self, following)
                position = {**following}

    def batches(self, examples: list[Example], position: dict[str, Any]) -> list[list[int]]:
        """The batches of a block, in an order that (seed, epoch, block) fixes."""
        if not examples:
            return []
        seconds = np.array([example.duration for example in examples])
        order = np.argsort(-seconds, kind="stable")
        batches = cut_batches(seconds, order, self.batch_seconds, self.most)
        np.random.default_rng([self.seed, position["epoch"], position["block"]]).shuffle(batches)
        return batches


class Feed:
    """The sources of a stream, open, from a position on."""

    def __init__(self, stream: SpeechStream, position: dict[str, Any]) -> None:
        self.stream = stream
        states = position["sources"] or [{"count": 0, "over": False}] * len(stream.sources)
        self.counts = [state["count"] for state in states]  # rows read of each source
        self.over = [state["over"] for state in states]
        self.rows, self.folders = [], []
        for source, state in zip(stream.sources, states, strict=True):
            rows, folder = open_rows(source, streaming=True)
            rows = split_dataset_by_node(rows, stream.rank, stream.world)
            if "rows" in state:
                rows.load_state_dict(state["rows"])
            self.rows.append(rows)
            self.folders.append(folder)
        self.iterators = [iter(rows) for rows in self.rows]

    def read(self, position: dict[str, Any], dropped: list[dict[str, Any]]) -> list[Example]:
        """The good examples of the block at `position`; the others are added to `dropped`."""
        stream, examples = self.stream, []
        rng = np.random.default_rng([stream.seed, position["epoch"], position["block"], 1])
        limit = stream.max_train_samples or float("inf")
        end = min(sum(self.counts) + stream.block, limit)
        while not all(self.over) and sum(self.counts) < end:
            weights = [
                0.0 if over else source["weight"]
                for source, over in zip(stream.sources, self.over, strict=True)
            ]
            which = int(rng.choice(len(weights), p=np.array(weights) / sum(weights)))
            row = next(self.iterators[which], None)
            if row is None:
                self.over[which] = True
                continue
            source = stream.sources[which]
            example = to_example(source, row, self.counts[which], self.folders[which])
            self.counts[which] += 1
            if reason := stream.admit(example):
                detail = f"{example.duration:.2f} s"
                dropped.append({"id": example.id, "reason": reason, "detail": detail})
            else:
                examples += [example] * int(source["repeat"])
        if not sum(self.counts):
            raise DataError(f"no example in {[source['path'] for source in stream.sources]}")
        return examples

    def position(self, before: dict[str, Any]) -> dict[str, Any]:
        """The position of the block after the one at `before`."""
        if all(self.over) or sum(self.counts) == self.stream.max_train_samples:
            return {**START, "epoch": before["epoch"] + 1}
        states = [
            {"rows": rows.state_dict(), "count": count, "over": over}
            for rows, count, over in zip(self.rows, self.counts, self.over, strict=True)
        ]
        return {**before, "block": before["block"] + 1, "emitted": 0, "sources": states}
