"""Apply functions to the local part of tensors that FSDP2 shards, and reduce results over the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


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


def reduce_over_shards(value: Tensor, tensor: Tensor, operation: Literal["sum", "max"]) -> Tensor:
    """Reduce a value that each process has computed from its local part of ``tensor``.

    Args:
        value: the value of this process, a scalar tensor.
        tensor: the tensor from which the value was computed. If ``tensor`` is not sharded, the value is returned.
        operation: "sum" or "max".
    """
    if not isinstance(tensor, DTensor):
        return value
    placements = [Partial(operation) if p.is_shard() else Replicate() for p in tensor.placements]
    return DTensor.from_local(value, tensor.device_mesh, placements).full_tensor()
