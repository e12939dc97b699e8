"""Batches of similar length: every clip once an epoch, within the budget, in a repeatable order."""

import numpy as np
import pytest

from tiny_audio.training.batches import LengthBatchSampler, cut_batches
from tiny_audio.training.manifests import DataError


@pytest.fixture(scope="module")
def lengths():
    """2,000 clips as long as those of a real corpus: many short, some long."""
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(1.5, 0.7, 2000), 0.5, 30.0)


def batches_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("count", [1, 2, 7, 40, 2000])
def test_every_epoch_sees_every_clip_once_in_len_batches(lengths, count):
    sampler = LengthBatchSampler(lengths[:count], 120, seed=3)
    for epoch in range(20):
        batches = batches_of(sampler, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert all(batches)
        assert len(batches) == len(sampler), f"epoch {epoch}"


@pytest.mark.parametrize("budget", [30, 64, 120, 600])
def test_padded_seconds_stay_within_the_budget(lengths, budget):
    sampler = LengthBatchSampler(lengths, budget)
    for epoch in range(5):
        for batch in batches_of(sampler, epoch):
            assert len(batch) * lengths[batch].max() <= budget + 1e-9
    # And it is used: nearly as few batches as the audio allows.
    if budget > 2 * lengths.max():
        assert len(sampler) < 1.15 * lengths.sum() / budget + 3


def test_lengths_that_differ_by_epoch_give_every_clip_once_in_len_batches(lengths):
    """Disturbed clips are longer in some epochs, here much longer in one that was not counted."""
    sampler = LengthBatchSampler(lambda epoch: lengths * (2.0 if epoch == 9 else 1.0), 120)
    for epoch in (0, 9, 10):
        batches = batches_of(sampler, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(2000))
        assert len(batches) == len(sampler)


@pytest.mark.parametrize("budget", [120, 240])
def test_padding_is_at_most_five_percent(lengths, budget):
    sampler = LengthBatchSampler(lengths, budget)
    padded = [len(b) * lengths[b].max() for b in batches_of(sampler, 0)]
    share = 1 - lengths.sum() / sum(padded)
    assert share <= 0.05


def test_order_depends_on_seed_and_epoch_alone(lengths):
    first, second = (LengthBatchSampler(lengths, 120, seed=5) for _ in range(2))
    batches_of(second, 2)  # what was asked for before does not matter
    assert batches_of(first, 4) == batches_of(second, 4)
    assert batches_of(first, 4) != batches_of(first, 5)
    assert batches_of(LengthBatchSampler(lengths, 120, seed=6), 4) != batches_of(first, 4)
    # Who stands beside whom changes too, not only the order of the batches.
    assert {frozenset(b) for b in batches_of(first, 4)} != {
        frozenset(b) for b in batches_of(first, 5)
    }


def test_a_clip_over_the_budget_is_an_error():
    with pytest.raises(DataError, match=r"batch_seconds=10.*12\.5 s"):
        LengthBatchSampler([3.0, 12.5], 10)


def test_a_batch_size_limits_the_clips_of_a_batch():
    seconds = np.random.default_rng(0).uniform(1, 4, 100).tolist()
    plain = LengthBatchSampler(seconds, 60.0, seed=1)
    small = LengthBatchSampler(seconds, 60.0, seed=1, most=5)
    assert max(map(len, plain)) > 5 and max(map(len, small)) == 5
    assert sorted(i for batch in small for i in batch) == list(range(100))


def test_batches_by_hand():
    seconds = np.array([1.0, 4.0, 2.0, 0.4, 3.0, 0.5])
    assert cut_batches(seconds, 6.0, 10) == [[1], [4, 2], [0, 5, 3]]
    # A batch may fill the budget exactly, and may hold `most` clips at most.
    assert cut_batches(seconds, 8.0, 10) == [[1, 4], [2, 0, 5, 3]]
    assert cut_batches(seconds, 8.0, 3) == [[1, 4], [2, 0, 5], [3]]
    assert cut_batches([], 8.0, 3) == []


def test_short_clips_fill_a_budget_of_less_than_a_second():
    assert cut_batches(np.full(6, 0.25), 0.75, 10) == [[0, 1, 2], [3, 4, 5]]


def test_clips_of_one_length_keep_their_order():
    batches = cut_batches([2.0] * 200, 20.0)
    assert [i for batch in batches for i in batch] == list(range(200))


def test_the_largest_batch_comes_first_in_the_first_epoch_alone(lengths):
    plain = LengthBatchSampler(lengths, 120, seed=1)
    sampler = LengthBatchSampler(lengths, 120, seed=1, largest_first=True)
    batches = batches_of(sampler, 0)
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert padded[0] == max(padded)
    largest = batches[0]
    others = [batch for batch in batches_of(plain, 0) if batch != largest]
    assert batches[1:] == others, "the other batches keep their order"
    assert batches_of(plain, 0) != batches, "it has to be asked for"
    assert batches_of(sampler, 1) == batches_of(plain, 1)


def test_the_budget_holds_for_the_lengths_of_the_epoch(lengths):
    """Disturbed clips are as long as their epoch makes them."""
    permuted = {epoch: np.random.default_rng(epoch).permutation(lengths) for epoch in range(8)}
    sampler = LengthBatchSampler(permuted.__getitem__, 120)
    for epoch in range(8):
        for batch in batches_of(sampler, epoch):
            assert len(batch) * permuted[epoch][batch].max() <= 120 + 1e-9


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_the_number_of_batches_suits_the_number_of_processes(lengths, multiple):
    alone = LengthBatchSampler(lengths, 120)
    sampler = LengthBatchSampler(lengths, 120, multiple=multiple)
    assert len(sampler) % multiple == 0
    assert len(alone) <= len(sampler) < len(alone) + multiple
    long_ones = LengthBatchSampler(np.linspace(16, 30, 20), 30, multiple=multiple)
    assert len(long_ones) == 20 // multiple * multiple  # each alone, where processes allow it


def test_few_more_batches_are_made_than_the_clips_need(lengths):
    """All epochs have as many batches as the one that needs most, and a few to spare."""
    natural = len(cut_batches(lengths, 120))
    assert natural <= len(LengthBatchSampler(lengths, 120)) <= 1.04 * natural + 2


def test_joined_batches_pass_the_budget_by_little():
    """Each of these clips fills a batch, and two processes need an even number of batches."""
    lengths = np.random.default_rng(0).uniform(16.0, 30.0, 1001)
    batches = LengthBatchSampler(lengths, 30.0, multiple=2).batches_of(0)
    padded = sorted(len(batch) * lengths[batch].max() for batch in batches)
    assert len(batches) == 1000 and padded[-2] <= 30.0
    assert padded[-1] < 34.0
