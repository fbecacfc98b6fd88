"""Shuffle the training examples in an order that depends only on the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import RandomSampler


class EpochSampler(RandomSampler):
    """A ``RandomSampler`` whose order depends only on the seed and the epoch.

    ``RandomSampler`` takes its order from torch's global random numbers. Lightning does not restore their state, so a
    resumed run would get the examples in another order. Lightning calls :meth:`set_epoch` before each epoch.

    Args:
        data_source: the examples.
        seed: seed of the order. Default: the seed of torch's global random numbers, which ``seed_everything`` sets.

    Example:
        >>> sampler = EpochSampler(range(5), seed=0)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> second = list(sampler)
        >>> sampler.set_epoch(0)
        >>> first != second, first == list(sampler)
        (True, True)
    """

    generator: torch.Generator

    def __init__(self, data_source: Sized, seed: int | None = None) -> None:
        super().__init__(data_source, generator=torch.Generator())
        self.seed = torch.initial_seed() if seed is None else seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # A seed is a 64-bit number.
        self.generator.manual_seed((self.seed + self.epoch) % 2**63)
        return super().__iter__()
