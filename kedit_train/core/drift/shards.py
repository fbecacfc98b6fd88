"""Apply functions to the local part of tensors that FSDP2 shards, and reduce results over the shards.

FSDP2 shards a parameter along its first dimension. For ``nn.Linear``, a shard consists of complete rows, each of which
belongs to one output of the layer. Functions that treat each row separately therefore need no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from kedit_train.core.fsdp import full_tensor, shard_like


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process stores; return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def map_local(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply an elementwise function to a tensor. The result is sharded in the same way as the tensor."""
    if not isinstance(tensor, DTensor):
        return function(tensor)
    return DTensor.from_local(
        function(tensor.to_local()), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )


def has_whole_rows(matrix: Tensor) -> bool:
    """Return True if this process stores complete rows of a matrix, or if the matrix is not sharded."""
    return not isinstance(matrix, DTensor) or not any(p.is_shard() and not p.is_shard(0) for p in matrix.placements)


def map_rows(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """Apply a function to a matrix that may be sharded. The result is sharded in the same way.

    Each process passes its own rows to the function. If the matrix is sharded by columns, it is gathered first.

    Args:
        function: receives [rows, n] and returns [rows, n]. It must treat each row separately.
        matrix: [m, n].
    """
    return map_local(function, matrix) if has_whole_rows(matrix) else map_whole(function, matrix)


def map_whole(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded, apply a function to it, and shard the result in the same way as the tensor."""
    return shard_like(function(full_tensor(tensor)), tensor)


def left_product(left: Tensor, matrix: Tensor) -> Tensor:
    """Return ``left @ matrix``, sharded in the same way as the matrix.

    Args:
        left: [m, m], complete on every process.
        matrix: [m, n], possibly sharded. It is gathered once, and each process computes its own rows of the product.
    """
    if not isinstance(matrix, DTensor):
        return left @ matrix
    if not has_whole_rows(matrix):
        return map_whole(lambda whole: left @ whole, matrix)
    own, whole = local_part(shard_like(left, matrix)), full_tensor(matrix)
    return map_local(lambda _: own @ whole, matrix)


def reduce_over_shards(value: Tensor, tensor: Tensor, operation: Literal["sum", "max"]) -> Tensor:
    """Reduce a value that each process has computed from its local part of ``tensor``.

    Args:
        value: the value of this process, of the same shape on every process.
        tensor: the tensor from which the value was computed. If ``tensor`` is not sharded, the value is returned.
        operation: "sum" or "max".
    """
    if not isinstance(tensor, DTensor):
        return value
    placements = [Partial(operation) if p.is_shard() else Replicate() for p in tensor.placements]
    return DTensor.from_local(value, tensor.device_mesh, placements).full_tensor()


def total(tensors: Iterable[Tensor]) -> float:
    """Return the sum of all entries of all tensors, including the shards of other processes.

    If the tensors are not sharded, the sum is computed on the device of the first tensor. Only the result is then
    transferred to the CPU.
    """
    sums = [reduce_over_shards(local_part(t).sum(dtype=torch.float64), t, "sum") for t in tensors]
    return float(torch.stack([each.to(sums[0].device) for each in sums]).sum()) if sums else 0.0


def mean(tensor: Tensor) -> Tensor:
    """Return the mean of all entries of a tensor, including the shards of other processes, as a scalar."""
    if not isinstance(tensor, DTensor):
        return tensor.mean()
    return reduce_over_shards(tensor.to_local().sum(), tensor, "sum") / tensor.numel()
