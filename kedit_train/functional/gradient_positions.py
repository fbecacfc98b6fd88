"""Restrict the weight gradient of a linear layer to chosen positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _GradientPositions(torch.autograd.Function):
    """Return the output unchanged, and split the gradient in the backward pass.

    At the chosen positions, the gradient flows to the weight and to the inputs of the layer. At all other positions, it
    flows to the inputs only.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(weight, chosen)
        ctx.dtype = inputs.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        weight, chosen = ctx.saved_tensors
        (gradient,) = gradients
        kept = gradient * chosen[..., None].to(gradient.dtype)
        to_inputs = None
        if ctx.needs_input_grad[1]:
            to_inputs = ((gradient - kept) @ weight.to(gradient.dtype)).to(ctx.dtype)
        return kept, to_inputs, None, None


def gradient_positions(output: Tensor, inputs: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Restrict the weight gradient of a linear layer to the chosen positions.

    Use the returned tensor in place of ``output``. It has the same values. In the backward pass, only the chosen
    positions contribute to the gradient of the weight. The gradients of the inputs change only by rounding.

    Args:
        output: [..., out], the output of the layer for ``inputs``.
        inputs: [..., in].
        weight: [out, in], the weight of the layer.
        chosen: [...], bool, True at the chosen positions.

    Returns:
        [..., out], equal to ``output`` bit for bit.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> inputs = torch.ones(1, 4, 3)
        >>> chosen = torch.tensor([[False, True, False, False]])
        >>> gradient_positions(layer(inputs), inputs, layer.weight, chosen).sum().backward()
        >>> layer.weight.grad.tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    return _GradientPositions.apply(output, inputs, weight.detach(), chosen)  # type: ignore[return-value]
