"""Adapt the weight of a penalty during training, so that the penalized value stays within a budget."""

from __future__ import annotations

import math

# In one step, the ratio of value and target counts as at least 1 / e and at most e. So a single measurement, such as
# the divergence of 0 before the first step, changes the weight by a limited factor.
_LARGEST_LOG_RATIO = 1.0
# Weight of the proportional term. With 1.0, the weight and the divergence oscillated in runs on the bundled model.
_GAIN = 0.5


def log_ratio(value: float, target: float) -> float:
    """Return the logarithm of ``value / target``, limited to [-1, 1].

    Args:
        value: the measured value, at least 0.
        target: the value to be reached, above 0.

    Example:
        >>> log_ratio(0.01, 0.01), log_ratio(0.0, 0.01), log_ratio(9.0, 0.01)
        (0.0, -1.0, 1.0)
    """
    if value <= 0.0:
        return -_LARGEST_LOG_RATIO
    return max(-_LARGEST_LOG_RATIO, min(_LARGEST_LOG_RATIO, math.log(value / target)))


def dual_ascent(log_multiplier: float, violation: float, *, step_size: float, bounds: tuple[float, float]) -> float:
    """Return the logarithm of the Lagrange multiplier after one step of dual ascent.

    The constrained problem is: minimize the loss, subject to ``value <= target``. Its Lagrange multiplier is the weight
    of the penalty. The step adds ``step_size * violation`` to the logarithm of the multiplier. Therefore, the step does
    not depend on the scale of the loss, of the value or of the multiplier.

    Args:
        log_multiplier: logarithm of the multiplier before the step.
        violation: result of :func:`log_ratio`; above 0 if the value is above its target.
        step_size: the largest change of the logarithm in one step.
        bounds: smallest and largest multiplier.

    References:
        Responsive Safety in Reinforcement Learning by PID Lagrangian Methods, arXiv 2007.03964.

    Example:
        >>> round(math.exp(dual_ascent(math.log(20.0), 1.0, step_size=0.1, bounds=(0.01, 1000.0))), 2)
        22.1
        >>> round(math.exp(dual_ascent(math.log(999.0), 1.0, step_size=0.1, bounds=(0.01, 1000.0))), 2)
        1000.0
    """
    smallest, largest = (math.log(bound) for bound in bounds)
    return max(smallest, min(largest, log_multiplier + step_size * violation))


def penalty_weight(log_multiplier: float, violation: float, *, largest: float) -> float:
    """Return the weight of the penalty.

    While the value is at or below its target, the weight is the multiplier. While the value is above its target, the
    weight is the multiplier times the square root of ``min(value / target, e)``. The multiplier alone would react only
    over many steps and could oscillate. The square root reacts at once and damps the oscillation, like the proportional
    term of a PID controller.

    Args:
        log_multiplier: logarithm of the multiplier.
        violation: result of :func:`log_ratio`.
        largest: the largest weight.

    References:
        Responsive Safety in Reinforcement Learning by PID Lagrangian Methods, arXiv 2007.03964.
        On PI Controllers for Updating Lagrange Multipliers in Constrained Optimization, arXiv 2406.04558.

    Example:
        >>> round(penalty_weight(math.log(20.0), -1.0, largest=1000.0), 3)
        20.0
        >>> round(penalty_weight(math.log(20.0), 1.0, largest=1000.0), 3)
        32.974
    """
    return min(largest, math.exp(log_multiplier + _GAIN * max(0.0, violation)))
