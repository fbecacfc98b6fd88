"""Find out how ``torch.amp.GradScaler`` has scaled the gradients, and whether it skips an optimizer step.

A fused optimizer unscales the gradients itself, inside its step. Before its step, the gradients are still multiplied by
the scale, unless the training loop has called ``scaler.unscale_``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kedit_train.core.checksums import first_not_finite


def gradient_scale(optimizer: Optimizer, scaler: Any = None) -> Tensor | float:
    """Return the factor by which the gradients are multiplied now, or 1.0 if the gradients are not scaled.

    Args:
        optimizer: the optimizer.
        scaler: the gradient scaler of the training loop, if there is one. This argument is not needed while
            ``scaler.step(optimizer)`` is running, because torch then stores the factor in ``optimizer.grad_scale``.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None and scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scale = scaler.get_scale()
    return 1.0 if scale is None else scale


def will_skip(optimizer: Optimizer, scaler: Any, gradients: Iterable[Tensor]) -> bool:
    """Return whether a gradient scaler will skip the next step, because a gradient is infinite or NaN.

    Args:
        optimizer: the optimizer.
        scaler: the scaler, if ``scaler.step(optimizer)`` has not been called yet. None otherwise.
        gradients: the gradients of the step.
    """
    if scaler is not None and scaler.is_enabled():
        return first_not_finite(gradients) is not None
    return skipped_by_scaler(optimizer)


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer has skipped this step because a gradient scaler found infinite gradients."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
