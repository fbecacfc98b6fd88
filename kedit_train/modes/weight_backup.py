"""A model's weights, kept aside and brought back to the last bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kedit_train.errors import EditError


class KeptWeights:
    """Every parameter and buffer of a model, on the CPU, with what may be trained and each module's mode.

    Everything is kept, and not the scope only: a training that the caller brings may change what it likes.

    Raises:
        EditError: the model is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(tensor, DTensor) for tensor in model.parameters()):
            raise EditError("the weights of a sharded model cannot be put back after each edit: give a whole model")
        self.model = model
        self.values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(model).items()}
        self.trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.modes = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put it all back, bit for bit; gradients that were left go.

        Raises:
            EditError: tensors have come, gone, or changed shape or dtype.
        """
        now = _tensors(self.model)
        for name in [*self.values, *now]:
            was, found = (_shape(tensors.get(name)) for tensors in (self.values, now))
            if was != found:
                raise EditError(
                    f"training changed {name} from {was} to {found}, so the model cannot be restored: train in place, "
                    "and take adapters off again"
                )
        for name, value in self.values.items():
            now[name].copy_(value)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trainable[name])
            parameter.grad = None
        for module, training in self.modes:
            module.training = training


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _shape(tensor: Any) -> str:
    return "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
