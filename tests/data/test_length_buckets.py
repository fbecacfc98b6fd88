"""LengthBuckets: every edit once per epoch, little padding, new batches in every epoch."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from kedit_train.data.length_buckets import LengthBuckets


def padding(batches, lengths):
    return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)


def drawn(n, seed):
    return RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 7, 24, 100, 1003])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_index_is_drawn_once_in_as_many_batches_as_without_buckets(n, drop_last):
    lengths = [random.Random(i).randint(3, 60) for i in range(n)]
    buckets = LengthBuckets(drawn(n, 0), 8, drop_last, lengths)
    batches = list(buckets)
    plain = list(BatchSampler(drawn(n, 0), 8, drop_last))
    assert len(batches) == len(buckets) == len(plain)
    assert sorted(map(len, batches)) == sorted(map(len, plain))
    # With drop_last, the same indices are left out as without buckets.
    assert sorted(i for b in batches for i in b) == sorted(i for b in plain for i in b)


def test_padding_is_less_than_a_fifth():
    lengths = [random.Random(i).randint(3, 60) for i in range(2000)]
    bucketed = padding(LengthBuckets(drawn(2000, 0), 16, False, lengths), lengths)
    plain = padding(BatchSampler(drawn(2000, 0), 16, False), lengths)
    assert bucketed < plain / 5


def test_epochs_differ_and_batches_do_not_run_from_short_to_long():
    lengths = [random.Random(i).randint(3, 60) for i in range(400)]
    epochs = [list(LengthBuckets(drawn(400, seed), 8, False, lengths)) for seed in range(2)]
    assert not {frozenset(b) for b in epochs[0]} & {frozenset(b) for b in epochs[1]}
    means = [sum(lengths[i] for i in b) / len(b) for b in epochs[0]]
    rising = sum(a < b for a, b in pairwise(means))
    assert 0.3 < rising / (len(means) - 1) < 0.7


def test_few_batches_stay_as_they_were_drawn():
    order = [3, 0, 2, 1, 4, 5, 7, 6]
    assert list(LengthBuckets(order, 2, False, [9, 1, 8, 2, 7, 3, 6, 4])) == [[3, 0], [2, 1], [4, 5], [7, 6]]


def test_the_random_state_of_the_run_does_not_change():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(LengthBuckets(SequentialSampler(range(64)), 4, False, list(range(64))))
    assert torch.equal(before, torch.get_rng_state())
