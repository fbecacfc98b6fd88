"""Move hidden states along the gradient of a value function, within a trust region.

References:
    "Aligning Large Language Models with Representation Editing: A Control Perspective" (RE-Control), arXiv 2406.05954.
    The paper has no trust region.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kedit_train.functional.norm_balls import step_toward
from kedit_train.functional.precision import widest


def ascend(hidden: Tensor, value: Callable[[Tensor], Tensor], *, step_size: float, steps: int, radius: float) -> Tensor:
    """Move hidden states by gradient ascent on their value: ``h <- h + step_size * gradient of value(h)``.

    After each step, the total change of each hidden state is scaled down if necessary. Its L2 norm is then at most
    ``radius`` times the L2 norm of the original hidden state. This bound also holds for the returned values after
    rounding.

    Args:
        hidden: [N, hidden], any float dtype.
        value: a function from [N, hidden] in fp32 to one value per position, [N].
        step_size: the factor by which the gradient is multiplied in a step, 0 or more.
        steps: number of gradient steps, 0 or more.
        radius: the trust region, as a fraction of the norm of the hidden state; 0 or more.

    Returns:
        [N, hidden] in the dtype of ``hidden``, without a gradient. If ``step_size``, ``steps`` or ``radius`` is 0, the
        result is ``hidden`` itself.

    Example:
        >>> ascend(torch.tensor([[3.0, 4.0]]), lambda h: h[:, 0], step_size=9.0, steps=2, radius=0.2)
        tensor([[4.0000, 4.0000]])
    """
    if step_size == 0 or steps == 0 or radius == 0 or hidden.numel() == 0:
        return hidden
    # generate() disables gradients, and other callers may use inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        start = hidden.detach().clone()
        center = widest(start)
        limit = radius * center.norm(dim=-1, keepdim=True)
        change = torch.zeros_like(center)
        for _ in range(steps):
            point = (center + change).to(start.device, torch.float32).requires_grad_()
            (gradient,) = torch.autograd.grad(value(point).sum(), point)
            # Entries of the gradient that are not finite are set to 0, so that they move nothing.
            finite = torch.nan_to_num(widest(gradient), nan=0.0, posinf=0.0, neginf=0.0)
            change = within_norm(change + step_size * finite, limit)
    return round_inward(start, change)


def within_norm(change: Tensor, limit: Tensor) -> Tensor:
    """Scale down each row whose L2 norm is above the limit of the row. Other rows do not change.

    Args:
        change: [N, hidden] in fp64.
        limit: [N, 1] in fp64, 0 or more.
    """
    change = torch.nan_to_num(change)
    # The squares of entries above 1e154 overflow. Therefore, each row is first scaled to a largest entry of 1, and the
    # norm of the scaled row is computed.
    largest = change.abs().amax(dim=-1, keepdim=True).clamp(min=1e-300)
    unit = change / largest
    norm = unit.norm(dim=-1, keepdim=True)
    # With the margin of 1e-12, the norm of the result is at most the limit, in whatever order the squares are summed.
    return torch.where(norm * largest > limit, unit * (limit / norm.clamp(min=1e-300) * (1 - 1e-12)), change)


def round_inward(start: Tensor, change: Tensor) -> Tensor:
    """Return ``start + change`` in the dtype of ``start``. Rounding never makes the change of an entry larger.

    Args:
        start: [N, hidden], any float dtype.
        change: [N, hidden] in fp64.
    """
    exact = widest(start)
    rounded = (exact + change).to(start)
    outside = ((widest(rounded) - exact).abs() > change.abs()).to(start.device)
    return torch.where(outside, step_toward(rounded, start), rounded)
