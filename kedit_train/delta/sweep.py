"""How much of an edit? Reliability against locality over coefficients, and one picked by a stated rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kedit_train.delta.edit_delta import EditDelta
from kedit_train.delta.task_vector import as_vector
from kedit_train.errors import EditError


@dataclass(frozen=True)
class Point:
    """What one coefficient gives; ``coefficient`` 0 is the base."""

    coefficient: float
    reliability: float
    locality: float


@dataclass(frozen=True)
class Sweep:
    """Every point in the order of coefficients, the one picked, and the delta that it stands for."""

    points: tuple[Point, ...]
    best: Point
    delta: EditDelta
    rule: str


def sweep(
    model: nn.Module,
    delta: Any,
    score: Callable[[nn.Module], Mapping[str, float]],
    coefficients: Sequence[float] = tuple(round(0.1 * i, 2) for i in range(1, 11)),
    *,
    keep: float = 0.95,
) -> Sweep:
    """Apply ``coefficient * delta`` for each coefficient, score the model, and pick one.

    The rule: of the coefficients with which the locality is at least ``keep`` of the base's own, the one of highest
    reliability; of equals, the smallest. So are coefficients picked for negation in "Editing Models with Task
    Arithmetic" (arXiv 2212.04089): 95 % of the accuracy elsewhere has to stay. Score on questions that are held out
    from whatever reports the result.

    Args:
        model: the base that the delta belongs to, given back as it was, bit for bit.
        delta: a delta or a task vector. For forgetting, negative coefficients and a score whose reliability is what is
            forgotten.
        score: model -> ``reliability`` and ``locality`` (or ``edit/reliability`` and ``edit/locality``, so that
            ``lambda model: evaluate(model, tokenizer, held_out).flat()`` will do).
        coefficients: any but 0, which is measured anyway.

    Raises:
        EditError: no coefficient is within the rule, or a score is missing.
    """
    chosen = sorted({float(c) for c in coefficients} - {0.0})
    if not chosen or not 0.0 <= keep <= 1.0:
        raise EditError(f"sweep: coefficients={list(coefficients)}, keep={keep}: give numbers but 0, and one in [0, 1]")
    vector = as_vector(delta)
    points = {0.0: _point(0.0, score(model))}
    for coefficient in chosen:
        applied = (coefficient * vector).apply(model)
        try:
            points[coefficient] = _point(coefficient, score(model))
        finally:
            applied.revert(model)
    least = keep * points[0.0].locality
    within = [points[c] for c in chosen if points[c].locality >= least]
    rule = f"highest reliability with locality >= {keep:g} of the base's ({least:.3f})"
    if not within:
        nearest = max((points[c] for c in chosen), key=lambda point: point.locality)
        raise EditError(
            f"sweep: no coefficient keeps the locality at {least:.3f} (best: {nearest.locality:.3f} with "
            f"{nearest.coefficient:g}); give smaller coefficients, or lower keep={keep:g}"
        )
    best = max(within, key=lambda point: (point.reliability, -abs(point.coefficient)))
    picked = (best.coefficient * vector).delta(configuration={"coefficient": best.coefficient, "rule": rule})
    return Sweep(tuple(points[c] for c in sorted(points)), best, picked, rule)


def _point(coefficient: float, scores: Mapping[str, float]) -> Point:
    found = {name: scores.get(name, scores.get(f"edit/{name}", math.nan)) for name in ("reliability", "locality")}
    for name, value in found.items():
        if not math.isfinite(value):
            raise EditError(f"sweep: the score with coefficient {coefficient:g} has no finite {name!r}")
    return Point(coefficient, **found)
