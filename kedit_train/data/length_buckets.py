"""Batches of edits of like length, so that little of a batch is padding, drawn anew in every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler


class LengthBuckets(BatchSampler):
    """Cut what ``sampler`` draws into pools, sort each pool by length, and cut it into batches.

    Pools are a quarter of an epoch at most: with few batches a single pool would put the same edits together in every
    epoch, and breadth-first training (arXiv 2509.22072) wants them mixed. Where that leaves one batch a pool, batches
    are those of a plain ``BatchSampler``.

    A subclass of torch's with its first arguments, so that Lightning can put a sampler for several processes inside:
    only where it is built in a ``train_dataloader`` hook (as in ``EditDataModule``), during which Lightning notes the
    arguments. One that was built before is refused by Lightning in a run of several processes.

    Args:
        sampler: draws indices, [N] in an order that is new in each epoch.
        batch_size: indices a batch.
        drop_last: leave out what does not fill a batch at the end of an epoch.
        lengths: tokens of each index.
        pool: the most batches that are sorted together.
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, lengths: Sequence[int], pool: int = 50) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.lengths, self.pool = lengths, pool

    def __iter__(self) -> Iterator[list[int]]:
        drawn = list(self.sampler)
        if self.drop_last:
            drawn = drawn[: len(drawn) // self.batch_size * self.batch_size]
        size = self.batch_size
        width = size * max(1, min(self.pool, len(drawn) // size // 4))
        order = {index: at for at, index in enumerate(drawn)}
        for start in range(0, len(drawn), width):
            pool = drawn[start : start + width]
            if width > size:
                pool.sort(key=lambda index: self.lengths[index])
            batches = [pool[i : i + size] for i in range(0, len(pool), size)]
            # As they were drawn, for sorted ones would run from short to long; no generator of its own is needed.
            yield from sorted(batches, key=lambda batch: min(order[index] for index in batch))
