"""Parameters that FSDP2 (``fully_shard``) has distributed over processes: reading, writing and checking them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from kedit_train.errors import EditError


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every process. Every process must call this. Other tensors are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a value in the same way as ``parameter``. Every process holds the whole value, so nothing is sent."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(root: nn.Module) -> None:
    """Free the parameters that FSDP2 has gathered for the last forward pass.

    FSDP2 keeps the gathered parameters of its root module. Until they are freed, ``named_parameters()`` returns those
    copies, and a value written into the sharded parameters does not reach the next forward pass.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_precision(scope: Iterable[nn.Parameter], widened: bool) -> None:
    """Raise an error if sharded half-precision parameters would be trained in fp32."""
    if widened and any(isinstance(p, DTensor) for p in scope):
        raise EditError(
            "full_precision=True cannot train a half-precision scope in fp32 where FSDP2 shards it; load the model in "
            "fp32 (MixedPrecisionPolicy computes in bf16), or pass full_precision=False.",
            component="ParameterScope",
        )


def check_head(head: nn.Module) -> None:
    """Raise an error if the output head's weights are sharded again before the loss is computed from them."""
    if not isinstance(head, FSDPModule) and any(isinstance(p, DTensor) for p in head.parameters()):
        raise EditError(
            "the output head is sharded again after every forward pass, so the loss cannot be computed from it; leave "
            "reshard_after_forward out of fully_shard for the whole model, or apply fully_shard to the head itself."
        )


def check_gradients(scope: Iterable[nn.Parameter]) -> None:
    """Raise an error if no sharded parameter has a gradient, so that the step would change nothing.

    FSDP2 moves gradients to the sharded parameters through the outputs of the modules that it shards. Gradients that
    bypass those outputs stay on the gathered copies, where no optimizer sees them.
    """
    scope = list(scope)
    if any(isinstance(p, DTensor) for p in scope) and all(p.grad is None for p in scope):
        raise EditError(
            "no gradient has reached the sharded parameters in scope, so this step would change nothing; apply "
            "fully_shard to the module that the loop calls, and compute the loss from its output."
        )
