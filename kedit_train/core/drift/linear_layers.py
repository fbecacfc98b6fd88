"""Find the linear layer that each parameter in scope belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from kedit_train.core.drift.shards import has_whole_rows
from kedit_train.core.scope.experts import is_stack
from kedit_train.errors import EditError


@dataclass(frozen=True)
class LinearLayer:
    """A weight matrix and the modules that multiply by it.

    Attributes:
        name: name of the parameter.
        modules: every module that uses the weight; several if the weight is shared.
        transposed: whether the weight is stored as [in, out] (``Conv1D`` of GPT-2) instead of [out, in]
            (``nn.Linear``, LoRA factors).
    """

    name: str
    modules: tuple[nn.Module, ...]
    transposed: bool

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Transpose ``weight`` if the layer stores it as [in, out]. A second call restores the stored layout."""
        return weight.T if self.transposed else weight


def find_linear_layers(model: nn.Module, scope: Mapping[str, nn.Parameter]) -> dict[str, LinearLayer]:
    """Find the linear layer of every parameter in scope.

    Args:
        model: the model that the scope belongs to.
        scope: name -> parameter.

    Returns:
        name -> linear layer, in the order of the scope.

    Raises:
        EditError: a parameter is not the weight of a linear layer (a bias, an embedding, a norm, stacked experts), is
            quantized, or is sharded along a dimension other than the first.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {id(p): [] for p in scope.values()}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in owners:
                owners[id(parameter)].append((module, key))
    layers, others = {}, []
    for name, parameter in scope.items():
        if isinstance(parameter, DTensor) and not has_whole_rows(parameter):
            raise EditError(
                f"the parameter {name!r} must be sharded along its first dimension, got {parameter.placements}; use "
                "fully_shard without shard_placement_fn and without tensor parallelism, train with DDP, or remove this "
                "callback."
            )
        if is_stack(name, parameter.shape):
            raise EditError(
                f"the scope must not contain stacked experts, got {name} {list(parameter.shape)}. Layer inputs are not "
                "measured per expert; use KLLocality instead of this callback, or select other weights, for "
                "example ParameterScope(modules='self_attn.o_proj.weight')."
            )
        layouts = {_is_transposed(module, key) for module, key in owners[id(parameter)]}
        if len(layouts) != 1 or None in layouts:
            others.append(name)
        else:
            modules = tuple(module for module, _ in owners[id(parameter)])
            layers[name] = LinearLayer(name, modules, bool(layouts.pop()))
    if others:
        listed = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        raise EditError(
            f"every parameter in scope must be the weight of nn.Linear or Conv1D, but these are not: {listed}; select "
            "weights only, for example ParameterScope(modules='mlp.down_proj.weight')."
        )
    return layers


def _is_transposed(module: nn.Module, key: str) -> bool | None:
    """Return whether the weight is stored as [in, out]; None if the parameter is not the weight of a linear layer."""
    if key != "weight":
        return None
    if isinstance(module, nn.Linear):
        # A quantized or flattened (FSDP1) weight does not have the shape that the module states.
        return False if module.weight.shape == (module.out_features, module.in_features) else None
    if isinstance(module, Conv1D):
        return True if module.weight.ndim == 2 and module.weight.shape[1] == module.nf else None
    return None
