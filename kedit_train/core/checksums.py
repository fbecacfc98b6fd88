"""Checksums that show whether a tensor has changed, without a copy of the tensor."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.core.drift.shards import local_part, reduce_over_shards

# To compute a checksum, the 64-bit words of a tensor are arranged in rows of this many words. The widths of weight
# matrices are usually even. The number here is odd, so that a regular change of a matrix, such as two swapped columns,
# is spread over several columns of this arrangement.
_WIDTH = 251
# The summaries of a group of tensors are combined at once, which needs about ten times the memory of the summaries. A
# group ends when its summaries have more words than this number.
_WORDS_AT_ONCE = 2**20


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Compute a 64-bit checksum of the bytes of a tensor.

    Equal bytes have the same checksum in every process and on every device. Any change of the bytes, for example
    swapped rows or flipped signs, changes the checksum, unless the change was constructed to keep the checksum. For a
    sharded tensor, only the local shard is read.

    Returns:
        A scalar int64 tensor on the device of ``tensor``.
    """
    return _combine([_summary(local_part(tensor.detach()))])[0]


@torch.no_grad()
def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Return the :func:`checksum` of each tensor. The devices are synchronized about once per 2 GB of tensors."""
    sums: list[int] = []
    group: list[list[Tensor]] = []
    words = 0
    for tensor in tensors:
        group.append(_summary(local_part(tensor.detach())))
        words += sum(map(len, group[-1]))
        if words > _WORDS_AT_ONCE:
            sums += _combine_by_device(group)
            group, words = [], 0
    return sums + _combine_by_device(group)


def _combine_by_device(summaries: list[list[Tensor]]) -> list[int]:
    """Compute the checksums of tensors that may be on several devices."""
    sums: list[int] = [0] * len(summaries)
    for device in {summary[0].device for summary in summaries}:
        positions = [i for i, summary in enumerate(summaries) if summary[0].device == device]
        for i, value in zip(positions, _combine([summaries[i] for i in positions]).tolist(), strict=True):
            sums[i] = value
    return sums


def _summary(values: Tensor) -> list[Tensor]:
    """Arrange the bytes of a tensor as a matrix of 8-byte words, and return its row sums and column sums.

    Words that do not fill a row, and bytes that do not fill a word, are returned unchanged. If there are only a few
    words, all of them are returned unchanged. A single sum of all words would miss some changes, for example two
    swapped words or two flipped signs. No temporary tensor has the size of ``values``.
    """
    values = values.contiguous().view(-1)
    rest: list[Tensor] = []
    if values.numel() * values.element_size() % 8 or values.storage_offset() * values.element_size() % 8:
        values = values.view(torch.uint8)
        whole = values.numel() // 8 * 8
        values, rest = values[:whole], [values[whole:].to(torch.int64)]
        if values.storage_offset() % 8:
            values = values.clone()
    words = values.view(torch.int64)
    if len(words) <= 2 * _WIDTH:
        return [words, *rest]
    rows = words[: len(words) // _WIDTH * _WIDTH].view(-1, _WIDTH)
    # int64 sums can overflow and wrap around, but a change of a single word still changes the sum.
    return [_column_sums(rows), rows.sum(1), words[rows.numel() :], *rest]


def _column_sums(rows: Tensor) -> Tensor:
    # On a CPU, numpy adds up columns in half the time that torch needs.
    return torch.from_numpy(np.add.reduce(rows.numpy(), axis=0)) if rows.device.type == "cpu" else rows.sum(0)


def _combine(summaries: list[list[Tensor]]) -> Tensor:
    """Compute one checksum per tensor, from the summaries that :func:`_summary` returned for the tensors.

    Each 64-bit word of a summary is split into two 32-bit halves. The checksum is a weighted sum of these halves.

    Args:
        summaries: one list of int64 vectors per tensor.

    Returns:
        The checksums, int64 [tensors].
    """
    # Many tensors are combined at once, because one operation per tensor would be slow for many small tensors.
    halves = torch.cat([vector for summary in summaries for vector in summary]).view(torch.int32)
    counts = [2 * sum(map(len, summary)) for summary in summaries]
    positions = torch.arange(1, max(counts) + 1, device=halves.device)
    # An odd pseudorandom factor for each position, the same in every process.
    mixed = positions * -7046029254386353131
    factors = (mixed ^ (mixed >> 32)) | 1
    totals = (halves * torch.cat([factors[:count] for count in counts])).cumsum(0)
    totals = torch.cat([totals.new_zeros(1), totals])
    ends = torch.tensor([0, *accumulate(counts)], device=halves.device)
    return totals[ends].diff()


@torch.no_grad()
def first_not_finite(tensors: Iterable[Tensor]) -> int | None:
    """Return the position of the first tensor that contains NaN or infinity, or None.

    If a tensor is sharded, every process must call this function. The result is the same in every process.
    """
    given = list(tensors)
    if not given:
        return None
    local = [local_part(tensor.detach()) for tensor in given]
    sharded = next((tensor for tensor in given if isinstance(tensor, DTensor)), given[0])
    sums = [value.sum().to(local[0].device, torch.float32) for value in local]
    if not bool(reduce_over_shards((~torch.stack(sums).isfinite()).float(), sharded, "max").any()):
        return None
    # A sum of finite numbers can overflow, so each entry is checked if a sum is not finite.
    found = torch.stack([(~value.isfinite()).any().to(local[0].device, torch.float32) for value in local])
    positions = reduce_over_shards(found, sharded, "max").nonzero().flatten().tolist()
    return positions[0] if positions else None
