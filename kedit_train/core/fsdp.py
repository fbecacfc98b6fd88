"""Parameters that FSDP2 (``fully_shard``) has spread over processes: their values, and when they can be trusted."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from kedit_train.errors import EditError


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process, which all have to ask for it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a value that every process holds wholly as its parameter is sharded; nothing is sent."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(root: nn.Module) -> None:
    """Give up what has been gathered for the last forward pass.

    FSDP2 keeps the gathered weights of its root module: until they are given up, ``named_parameters()`` names those
    copies, and a value written into the parameters proper does not reach the next forward pass.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_precision(scope: Iterable[nn.Parameter], widened: bool) -> None:
    """Refuse a scope in fp32 among sharded parameters in half precision."""
    if widened and any(isinstance(p, DTensor) for p in scope):
        raise EditError(
            "the half-precision scope would be trained in fp32, which cannot be done where FSDP2 shards it; load the "
            "model in fp32 (MixedPrecisionPolicy computes in bf16), or give ParameterScope full_precision=False"
        )


def check_head(head: nn.Module) -> None:
    """Refuse an output head whose weights are not there after the forward pass, when it has tokens to score."""
    if not isinstance(head, FSDPModule) and any(isinstance(p, DTensor) for p in head.parameters()):
        raise EditError(
            "the output head is sharded again after every forward pass, so no token can be scored with it; leave "
            "reshard_after_forward out of fully_shard for the whole model, or apply fully_shard to the head itself"
        )


def check_gradients(scope: Iterable[nn.Parameter]) -> None:
    """Refuse a step in which nothing moves because FSDP2 has not been told of the backward pass.

    It learns of it through the outputs of the modules that it shards; gradients that went past those stay on the
    gathered copies, where no optimizer sees them.
    """
    scope = list(scope)
    if any(isinstance(p, DTensor) for p in scope) and all(p.grad is None for p in scope):
        raise EditError(
            "no gradient has reached the sharded parameters in scope, so this step would change nothing; apply "
            "fully_shard to the very module that the loop calls, and take the loss from what it returns"
        )
