"""Batches of similar length by a budget of padded audio seconds.

Their order depends on (seed, epoch) alone, so that a resumed run repeats it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .manifests import DataError


def cut_batches(
    seconds: np.ndarray, order: np.ndarray, batch_seconds: float, most: int
) -> list[list[int]]:
    """Cut clips in the given order (longest first) where padding would exceed `batch_seconds`."""
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = 0.0
    for i in order:
        longest = max(longest, seconds[i])
        if batch and (len(batch) == most or longest * (len(batch) + 1) > batch_seconds):
            batches.append(batch)
            batch, longest = [], seconds[i]
        batch.append(int(i))
    return [*batches, batch] if batch else batches


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of similar length whose padded audio stays within `batch_seconds`.

    Examples are sorted by their duration with up to 3 % of jitter, cut into batches by the budget,
    and the batches are shuffled; all drawn from (seed, epoch). `most` limits the clips in a batch
    as well; their number is a multiple of `multiple`, the processes that share them. With
    `largest_first` the first epoch starts with its largest batch: memory runs out now or never.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        batch_seconds: float,
        seed: int = 0,
        shuffle: bool = True,
        most: int | None = None,
        multiple: int = 1,
        largest_first: bool = False,
    ) -> None:
        self.seconds, self.most = np.asarray(seconds), most or len(seconds)
        self.largest_first = largest_first
        if (longest := self.seconds.max()) > batch_seconds:
            below = f"is below the longest clip ({longest:.1f} s)"
            raise DataError(f"training.batch_seconds={batch_seconds} {below}")
        self.batch_seconds, self.seed, self.shuffle = batch_seconds, seed, shuffle
        self.epoch = self.count = 0
        if shuffle:
            most_batches = max(len(self._make(epoch)) for epoch in range(8))
            wanted = most_batches + most_batches // 50 + 1
            wanted += -wanted % multiple
            self.count = min(wanted, len(self.seconds) // multiple * multiple)
        self.count = len(self._make(0))
        self.batch_size = None  # accelerate asks; batches have no fixed size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration shuffles for."""
        self.epoch = epoch

    def _make(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        jitter = rng.uniform(0.97, 1.03, len(self.seconds)) if self.shuffle else 1.0
        order = np.argsort(-self.seconds * jitter, kind="stable")
        batches = cut_batches(self.seconds, order, self.batch_seconds, self.most)
        # Jitter moves the count by a batch or two; the trainer needs one number for all epochs, so
        # the fullest batches are halved until it is reached.
        while len(batches) < self.count:
            fullest = max(range(len(batches)), key=lambda j: len(batches[j]))
            batch = batches.pop(fullest)
            batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        if self.shuffle:
            rng.shuffle(batches)
        if self.largest_first and epoch == 0:
            padded = [len(batch) * self.seconds[batch].max() for batch in batches]
            batches.insert(0, batches.pop(int(np.argmax(padded))))
        return batches

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._make(self.epoch)
