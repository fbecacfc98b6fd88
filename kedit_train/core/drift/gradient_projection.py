"""Project gradients into the space that a constraint leaves free, before the optimizer uses the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.functional.precision import wide


def project_gradients(
    layers: Mapping[str, LinearLayer], scope: Mapping[str, nn.Parameter], project: Callable[[str, Tensor], Tensor]
) -> list[Any]:
    """Replace the gradient of each weight by its projection after every backward pass.

    The projection removes gradient components along directions in which the constraint allows no change. Without the
    projection, these components would stay large, enter Adam's second moments and determine the step size of all other
    components. The projection alone does not constrain the weights: Adam rescales each entry of the gradient, so a step
    of Adam can leave the projected space.

    Args:
        layers: name -> linear layer of the weight.
        scope: name -> parameter.
        project: function that receives a name and a gradient [out, in] in fp32 or fp64, and returns the projection
            [out, in]. The function must be linear, because accumulated gradients are projected more than once.

    Returns:
        One handle per weight; ``handle.remove()`` ends the projection.
    """

    def hook(layer: LinearLayer) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def replace(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None:
                # In place, because DDP reduces this tensor object.
                gradient.copy_(layer.as_matrix(project(layer.name, layer.as_matrix(wide(gradient)))))

        return replace

    return [scope[name].register_post_accumulate_grad_hook(hook(layer)) for name, layer in layers.items()]
