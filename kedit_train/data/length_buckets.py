"""Put edits of similar length into the same batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler


class LengthBuckets(BatchSampler):
    """A batch sampler that puts edits of similar length into the same batch, to reduce padding.

    The indices of an epoch are cut into groups, called pools. Each pool is sorted by length and cut into batches. If a
    pool has the size of one batch, nothing is sorted, and the batches are the same as those of ``BatchSampler``.

    An epoch with at least four batches has at least four pools. In a shorter epoch, every batch is a pool. If a short
    epoch were a single pool, each batch would contain the same edits in every epoch. Breadth-first training (arXiv
    2509.22072) needs different batches in each epoch.

    The first three arguments are those of ``BatchSampler``, so Lightning can insert a distributed sampler. Create the
    ``LengthBuckets`` object inside the ``train_dataloader`` hook, as ``EditDataModule`` does. Lightning does not accept
    an object that was created earlier.

    Args:
        sampler: yields the indices of the edits, in a new order in each epoch.
        batch_size: number of indices per batch.
        drop_last: leave out the last batch of an epoch if it is not full.
        lengths: the number of tokens of the edit at each index.
        pool: the maximum number of batches that are sorted together.
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
        position = {index: i for i, index in enumerate(drawn)}
        for start in range(0, len(drawn), width):
            pool = drawn[start : start + width]
            if width > size:
                pool.sort(key=lambda index: self.lengths[index])
            batches = [pool[i : i + size] for i in range(0, len(pool), size)]
            # In a sorted pool, the batches would run from short to long. So they are yielded in the order in which
            # their first index was drawn.
            yield from sorted(batches, key=lambda batch: min(position[index] for index in batch))
