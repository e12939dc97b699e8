"""Batches of clips of similar length, limited by their padded audio seconds.

The order depends only on (seed, epoch), so a resumed run repeats it.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .manifests import DataError


def cut_batches(
    seconds: Sequence[float] | np.ndarray,
    batch_seconds: float,
    most: int | None = None,
    jitter: float | np.ndarray = 1.0,
) -> list[list[int]]:
    """Sort clips by length, longest first; cut batches of at most `batch_seconds`, with padding.

    `most` also limits the clips in a batch. A clip longer than `batch_seconds` is a batch of its
    own. `jitter` scales each length for the sorting alone.
    """
    lengths = np.asarray(seconds)
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = 0.0
    for i in np.argsort(-lengths * jitter, kind="stable"):
        longest = max(longest, lengths[i])
        if batch and (len(batch) == most or longest * (len(batch) + 1) > batch_seconds):
            batches.append(batch)
            batch, longest = [], lengths[i]
        batch.append(int(i))
    return [*batches, batch] if batch else batches


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of similar length whose padded audio stays within `batch_seconds`.

    `seconds` are the durations of the clips, or a function that gives those of an epoch. The
    sampler sorts the clips by duration with up to 3 % of jitter, cuts them into batches by the
    budget, and shuffles the batches. (seed, epoch) determines the result. `most` also limits the
    clips in a batch. The number of batches is a multiple of `multiple`, the number of processes.
    With `largest_first`, the first epoch starts with its largest batch, so a batch that does not
    fit in memory fails at the first step.

    Raises:
        DataError: if the longest clip exceeds `batch_seconds`.
    """

    def __init__(
        self,
        seconds: Sequence[float] | Callable[[int], Sequence[float]],
        batch_seconds: float,
        seed: int = 0,
        most: int | None = None,
        multiple: int = 1,
        largest_first: bool = False,
    ) -> None:
        self.lengths = seconds if callable(seconds) else lambda _epoch: seconds
        first = np.asarray(self.lengths(0))
        self.most, self.largest_first = most, largest_first
        if (longest := first.max()) > batch_seconds:
            raise DataError(
                f"training.batch_seconds={batch_seconds} is shorter than the longest clip "
                f"({longest:.1f} s): raise it, or lower data.max_seconds"
            )
        self.batch_seconds, self.seed = batch_seconds, seed
        self.epoch = 0
        self.count = 0  # batches in every epoch, once it is known
        most_batches = max(len(self.batches_of(epoch)) for epoch in range(8))
        with_reserve = most_batches + most_batches // 50 + 1
        with_reserve += -with_reserve % multiple
        self.count = min(with_reserve, len(first) // multiple * multiple)
        self.count = len(self.batches_of(0))
        self.batch_size = None  # accelerate reads it; batches have no fixed size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the next shuffle."""
        self.epoch = epoch

    def batches_of(self, epoch: int) -> list[list[int]]:
        """Cut and shuffle the batches of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        seconds = np.asarray(self.lengths(epoch))
        jitter = rng.uniform(0.97, 1.03, len(seconds))
        batches = cut_batches(seconds, self.batch_seconds, self.most, jitter)
        # The number of batches differs a little between epochs, and the trainer needs the same in
        # all of them: join the smallest batches or halve the fullest until it is reached.
        while self.count and len(batches) > self.count:
            batches.sort(key=lambda batch: len(batch) * seconds[batch].max())
            batches[:2] = [batches[0] + batches[1]]
        while len(batches) < self.count:
            fullest = max(range(len(batches)), key=lambda j: len(batches[j]))
            batch = batches.pop(fullest)
            batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        rng.shuffle(batches)
        if self.largest_first and epoch == 0:
            padded = [len(batch) * seconds[batch].max() for batch in batches]
            batches.insert(0, batches.pop(int(np.argmax(padded))))
        return batches

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches_of(self.epoch)
