"""Read, write and check parameters that FSDP2 (``fully_shard``) has sharded over processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from kedit_train.errors import EditError

# Every process has the whole tensor, so no process needs to send shards. torch 2.6 has no argument for this choice, and
# always sends the shards from the first process.
WITHOUT_BROADCAST = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every process, and return any other tensor unchanged.

    If the tensor is sharded, every process must call the function.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard ``value`` in the same way as ``parameter``.

    If ``parameter`` is not sharded, or ``value`` is already sharded, ``value`` is returned unchanged. Otherwise, every
    process must pass the complete value, because the processes exchange no data.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, **WITHOUT_BROADCAST)


def reshard(root: nn.Module) -> None:
    """Free the full parameters that FSDP2 gathered for the last forward pass.

    FSDP2 keeps the full parameters of its root module after a forward pass. Until they are freed,
    ``named_parameters()`` returns the full parameters instead of the sharded parameters. The next forward pass would
    use the full parameters, too. Values that were written into the sharded parameters would then have no effect.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered_parameters(root: nn.Module, scope: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the unsharded parameter objects that FSDP2 uses in the forward pass.

    Use these objects only as inputs of ``torch.autograd.grad``. Do not read their values: FSDP2 uses the same objects
    in every forward pass, but frees their memory between the passes.

    Args:
        root: the module that the training loop trains. Run its forward pass at least once before this call.
        scope: name -> parameter, sharded or not.

    Returns:
        name -> the gathered parameter, or the parameter itself if FSDP2 does not shard it.
    """
    reshard(root)
    names = {id(parameter): name for name, parameter in scope.items()}
    places: dict[str, tuple[nn.Module, str]] = {}
    for module in root.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in names:
                places[names[id(parameter)]] = (module, key)
    found: dict[str, Tensor] = dict(scope)
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
            current = {name: getattr(module, key) for name, (module, key) in places.items()}
            found |= {name: parameter for name, parameter in current.items() if not isinstance(parameter, DTensor)}
            unit.reshard()
    return found


def check_precision(scope: Iterable[nn.Parameter], widened: bool) -> None:
    """Raise an error if sharded half-precision parameters would be trained in fp32."""
    if widened and any(isinstance(p, DTensor) for p in scope):
        raise EditError(
            "full_precision=True cannot train half-precision parameters in fp32 if FSDP2 shards them; load the model "
            "in fp32 and let MixedPrecisionPolicy compute in bf16, or pass full_precision=False.",
            component="ParameterScope",
        )


def check_head(head: nn.Module) -> None:
    """Raise an error if the output head's weights are sharded again before the loss is computed from them."""
    if not isinstance(head, FSDPModule) and any(isinstance(p, DTensor) for p in head.parameters()):
        raise EditError(
            "the loss needs the complete weights of the output head after the forward pass, but FSDP2 has already "
            "sharded them again by then; remove reshard_after_forward from the fully_shard call for the whole model, "
            "or apply fully_shard to the head itself."
        )
