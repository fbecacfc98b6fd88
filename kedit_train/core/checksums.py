"""Checksums that show whether a tensor has changed, without a copy of the tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kedit_train.core.drift.shards import local_part


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Add up the bytes of a tensor as 64-bit integers.

    If two tensors of the same shape and dtype have different checksums, their values differ. A change of a single entry
    always changes the checksum. Changes of several entries can cancel out, but practically never do so by accident. For
    a sharded tensor, only the local shard is added up.

    Returns:
        A scalar int64 tensor on the device of ``tensor``.
    """
    values = local_part(tensor.detach()).contiguous().flatten()
    if not (values.numel() * values.element_size() % 8 or values.storage_offset() * values.element_size() % 8):
        # Nearly every tensor. A model with many small tensors notices each further operation.
        return values.view(torch.int64).sum()
    values = values.view(torch.uint8)
    whole = values.numel() // 8 * 8
    words, rest = values[:whole], values[whole:]
    if words.storage_offset() % 8:
        words = words.clone()
    return words.view(torch.int64).sum() + rest.sum(dtype=torch.int64)


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Return the :func:`checksum` of each tensor. The device is synchronized once for all tensors."""
    sums = [checksum(tensor) for tensor in tensors]
    return torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []


@torch.no_grad()
def first_not_finite(tensors: Iterable[Tensor]) -> int | None:
    """Return the position of the first tensor that contains NaN or infinity, or None.

    For a sharded tensor, only the local shard is checked.
    """
    local = [local_part(tensor.detach()) for tensor in tensors]
    sums = [value.sum() for value in local]
    if not sums or bool(torch.stack([s.to(sums[0].device, torch.float32) for s in sums]).isfinite().all()):
        return None
    # A sum of finite numbers can overflow, so each entry is checked if a sum is not finite.
    return next((i for i, value in enumerate(local) if not bool(value.isfinite().all())), None)
