"""Dual ascent on the logarithm of a weight: direction, bounds, scale, and the optimum of a problem with a solution."""

from __future__ import annotations

import math

import pytest

from kedit_train.functional.dual_ascent import dual_ascent, log_ratio, penalty_weight

BOUNDS = (1e-2, 1e3)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_log_ratio_is_the_logarithm_between_minus_one_and_one(scale: float) -> None:
    for ratio in (0.5, 1.0, 1.7, 2.5):
        assert log_ratio(ratio * scale, scale) == pytest.approx(math.log(ratio), abs=1e-12)
    assert log_ratio(0.0, scale) == log_ratio(scale / 100, scale) == -1.0
    assert log_ratio(100 * scale, scale) == 1.0


@pytest.mark.parametrize("weight", [0.02, 1.0, 900.0])
def test_the_weight_rises_above_the_target_and_falls_below_it(weight: float) -> None:
    for violation in (-1.0, -0.3, 0.0, 0.3, 1.0):
        after = math.exp(dual_ascent(math.log(weight), violation, step_size=0.1, bounds=BOUNDS))
        assert after == pytest.approx(weight * math.exp(0.1 * violation))


def test_the_weight_stays_within_its_bounds() -> None:
    low, high = math.log(1e-2), math.log(1e3)
    assert dual_ascent(low, -1.0, step_size=0.5, bounds=BOUNDS) == low
    assert dual_ascent(high, 1.0, step_size=0.5, bounds=BOUNDS) == high
    assert penalty_weight(high, 1.0, largest=1e3) == 1e3


def test_only_a_violation_raises_the_weight_at_once() -> None:
    assert penalty_weight(math.log(3.0), -1.0, largest=1e3) == pytest.approx(3.0)
    assert penalty_weight(math.log(3.0), math.log(2.0), largest=1e3) == pytest.approx(3.0 * 2.0**0.5)


@pytest.mark.parametrize("start", [0.05, 5.0, 500.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gradient_descent_with_dual_ascent_finds_the_constrained_optimum(start: float, scale: float) -> None:
    # Minimize scale * (x - 3)^2 subject to x^2 <= 1. The optimum is x = 1, with the multiplier 2 * scale.
    x, log_multiplier, weight = 0.0, math.log(start * scale), start * scale
    for _ in range(3000):
        gradient = 2 * scale * (x - 3) + weight * 2 * x
        x -= 0.1 * gradient / (scale + weight)
        violation = log_ratio(x * x, 1.0)
        bounds = (1e-3 * scale, 1e3 * scale)
        log_multiplier = dual_ascent(log_multiplier, violation, step_size=0.1, bounds=bounds)
        weight = penalty_weight(log_multiplier, violation, largest=bounds[1])
    assert x == pytest.approx(1.0, abs=1e-3)
    assert math.exp(log_multiplier) == pytest.approx(2.0 * scale, rel=1e-2)
