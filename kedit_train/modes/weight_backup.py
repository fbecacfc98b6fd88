"""Copy a model's weights and restore them bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kedit_train.errors import EditError


class WeightBackup:
    """A copy of a model's parameters and buffers on the CPU, with all ``requires_grad`` and ``training`` flags.

    The backup includes frozen weights, because a custom training function may change any weight.

    Args:
        model: the model to back up.

    Raises:
        EditError: the model is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(tensor, DTensor) for tensor in model.parameters()):
            raise EditError(
                "model must not be sharded over processes, because the weights of a sharded model cannot be restored; "
                "load the complete model in one process."
            )
        self.model = model
        self.values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(model).items()}
        self.trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.training_flags = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all values and flags, and set all gradients to None.

        Raises:
            EditError: a tensor was added or removed, or its shape or dtype changed.
        """
        current = _tensors(self.model)
        for name in [*self.values, *current]:
            before, after = (_describe(tensors.get(name)) for tensors in (self.values, current))
            if before != after:
                change = f"changed the tensor {name!r} from {before} to {after}"
                if name not in self.values or name not in current:
                    change = f"{'removed' if name in self.values else 'added'} the tensor {name!r}"
                raise EditError(
                    "each tensor must keep its name, shape and dtype, so that the model can be restored, but training "
                    f"{change}; train the given model in place, and remove adapters "
                    "after training."
                )
        for name, value in self.values.items():
            current[name].copy_(value)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trainable[name])
            parameter.grad = None
        for module, training in self.training_flags:
            module.training = training


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _describe(tensor: Any) -> str:
    return "no tensor" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
