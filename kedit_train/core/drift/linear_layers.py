"""Which parameters are the weight of a linear map, and which way round it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from kedit_train.errors import EditError


@dataclass(frozen=True)
class LinearMap:
    """A weight and every module that multiplies by it.

    Attributes:
        inputs_first: stored [in, out] (``Conv1D`` of GPT-2) rather than [out, in] (``nn.Linear``, LoRA factors).
    """

    name: str
    modules: tuple[nn.Module, ...]
    inputs_first: bool

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight (or its change) as [out, in]; applied twice, as it was."""
        return weight.T if self.inputs_first else weight


def linear_maps(model: nn.Module, scope: Mapping[str, nn.Parameter]) -> dict[str, LinearMap]:
    """Find the linear map of every parameter in scope.

    Raises:
        EditError: a parameter is none's weight (a bias, an embedding, a norm, fused experts), is packed by
            quantisation, or is sharded.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {id(p): [] for p in scope.values()}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in owners:
                owners[id(parameter)].append((module, key))
    found, others = {}, []
    for name, parameter in scope.items():
        if isinstance(parameter, DTensor):
            raise EditError(
                f"{name} is sharded over processes (DTensor), and the projection needs whole rows of the "
                "weight and the inputs of the whole module; train with DDP, or leave this callback out"
            )
        stored = {_inputs_first(module, key) for module, key in owners[id(parameter)]}
        if len(stored) != 1 or None in stored:
            others.append(name)
        else:
            modules = tuple(module for module, _ in owners[id(parameter)])
            found[name] = LinearMap(name, modules, bool(stored.pop()))
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        raise EditError(
            f"the scope holds what is not the weight of nn.Linear or Conv1D ({shown}), whose change no "
            "projection of inputs can confine; choose weights alone, as ParameterScope(modules='mlp.down_proj.weight')"
        )
    return found


def _inputs_first(module: nn.Module, key: str) -> bool | None:
    """How this parameter is stored, or None where the module is no linear map with it as plain weight."""
    if key != "weight":
        return None
    if isinstance(module, nn.Linear):
        # Quantised and flattened (FSDP1) weights have another shape than the module says.
        return False if module.weight.shape == (module.out_features, module.in_features) else None
    if isinstance(module, Conv1D):
        return True if module.weight.ndim == 2 and module.weight.shape[1] == module.nf else None
    return None
