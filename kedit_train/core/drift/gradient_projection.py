"""Gradients brought into the space that a constraint leaves free, before an optimizer learns its scales from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.drift.linear_layers import LinearMap
from kedit_train.functional.precision import wide


def project_gradients(
    maps: Mapping[str, LinearMap], scope: Mapping[str, nn.Parameter], project: Callable[[str, Tensor], Tensor]
) -> list[Any]:
    """From now on, replace the gradient of each weight by its projection after every backward pass.

    This alone confines nothing: Adam divides entry by entry. But what a weight may not follow never grows smaller, so
    without it Adam's scales are made of that, and its steps go where they will be undone.

    Args:
        maps: the weights by name.
        scope: name -> parameter.
        project: ``(name, gradient [out, in], at least fp32) -> [out, in]``, linear.

    Returns:
        Handles with ``remove()``.
    """

    def hook(one: LinearMap) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def replace(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None:
                # In place, for DDP reduces this very tensor. Accumulated gradients are projected again: it is linear.
                gradient.copy_(one.as_matrix(project(one.name, one.as_matrix(wide(gradient)))))

        return replace

    return [scope[name].register_post_accumulate_grad_hook(hook(one)) for name, one in maps.items()]
