"""Sweep: score a model with several multiples of a delta, and pick one multiple by a fixed rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kedit_train.arguments import check_arguments, within
from kedit_train.delta.edit_delta import EditDelta
from kedit_train.delta.task_vector import as_vector
from kedit_train.errors import EditError, reported_by

COEFFICIENTS = tuple(round(0.1 * i, 2) for i in range(1, 11))


@dataclass(frozen=True)
class SweepPoint:
    """The scores of one model of a sweep.

    The model is the base model plus ``coefficient`` times the delta. Coefficient 0 is the unchanged base model.
    """

    coefficient: float
    reliability: float
    locality: float


@dataclass(frozen=True)
class Sweep:
    """The result of :func:`sweep`.

    Args:
        points: one point per coefficient, in ascending order, including the base model (coefficient 0).
        best: the point that :func:`sweep` picked.
        delta: ``best.coefficient`` times the delta that was passed to :func:`sweep`, ready to apply and to save.
        rule: a short description of how ``best`` was picked.
    """

    points: tuple[SweepPoint, ...]
    best: SweepPoint
    delta: EditDelta
    rule: str


def sweep(
    model: nn.Module,
    delta: Any,
    score: Callable[[nn.Module], Mapping[str, float]],
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    keep_locality: float = 0.95,
) -> Sweep:
    """Score the model with several multiples of a delta, and pick one coefficient.

    Each coefficient gives a model: the base model plus the coefficient times the delta. A fixed rule picks one model:

    1. A model is excluded if its locality is less than ``keep_locality`` times the locality of the base model.
    2. Of the other models, the one with the highest reliability is picked. If several models have this reliability, the
       one with the coefficient nearest to 0 is picked.
    3. If the picked model is not more reliable than the base model, an error is raised.

    The paper under "References" uses this rule to make a model forget a task. In the paper, the model must keep 95 % of
    its accuracy on a control task.

    The coefficient is picked on the questions that ``score`` uses. Report final results on other questions.

    Args:
        model: the base model of the delta. It is restored bit for bit, also after an error.
        delta: a delta or a task vector. To make a model forget, use negative coefficients and a score in which
            ``reliability`` measures how much is forgotten.
        score: function that is called with the model and returns a dict with the keys ``reliability`` and ``locality``,
            or ``edit/reliability`` and ``edit/locality`` as in ``evaluate(...).flat()``.
        coefficients: the multiples to score. At least one of them must not be 0. Coefficient 0 is always scored.
            Default: 0.1, 0.2, ... 1.
        keep_locality: fraction of the locality of the base model that must remain, in [0, 1].

    Raises:
        EditError: no model keeps enough locality, no remaining model is more reliable than the base model, a
            coefficient is not finite, all coefficients are 0, or a score is missing or not finite.

    References:
        "Editing Models with Task Arithmetic", arXiv 2212.04089.

    Example:
        >>> import torch
        >>> from kedit_train import EditDelta
        >>> from kedit_train.delta import sweep
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> delta = EditDelta.between(model, {"weight": torch.ones(1, 1)})
        >>> def score(model):
        ...     weight = float(model.weight.detach())
        ...     return {"reliability": weight, "locality": 1 - weight / 10}
        >>> result = sweep(model, delta, score, coefficients=[0.25, 0.5, 1.0])
        >>> result.best
        SweepPoint(coefficient=0.5, reliability=0.5, locality=0.95)
    """
    check_arguments("sweep", keep_locality=(keep_locality, within("[0, 1]")))
    chosen = sorted({float(coefficient) for coefficient in coefficients} - {0.0})
    if not chosen or not all(map(math.isfinite, chosen)):
        raise EditError(
            f"coefficients must be finite and contain a number other than 0, got {list(coefficients)}.",
            component="sweep",
        )
    with reported_by("sweep"):
        vector = as_vector(delta)
        points = {0.0: _scored(0.0, score(model))}
        for coefficient in chosen:
            applied: EditDelta = (coefficient * vector).apply(model)
            try:
                points[coefficient] = _scored(coefficient, score(model))
            finally:
                applied.revert(model)
        least = keep_locality * points[0.0].locality
        allowed = [points[coefficient] for coefficient in chosen if points[coefficient].locality >= least]
        if not allowed:
            nearest = max((points[coefficient] for coefficient in chosen), key=lambda point: point.locality)
            raise EditError(
                f"no coefficient keeps a locality of at least {least:.3f} (the highest is {nearest.locality:.3f} with "
                f"coefficient {nearest.coefficient:g}); use coefficients nearer to 0, or a keep_locality below "
                f"{keep_locality:g}."
            )
        best = max(allowed, key=lambda point: (point.reliability, -abs(point.coefficient)))
        if best.reliability <= points[0.0].reliability:
            raise EditError(
                "none of the coefficients with enough locality has a higher reliability than the base model "
                f"({points[0.0].reliability:.3f}); use coefficients farther from 0, lower keep_locality, or train "
                "the edit longer."
            )
    rule = f"highest reliability with a locality of at least {keep_locality:g} x that of the base model ({least:.3f})"
    scaled = (best.coefficient * vector).delta(configuration={"coefficient": best.coefficient, "rule": rule})
    return Sweep(tuple(points[coefficient] for coefficient in sorted(points)), best, scaled, rule)


def _scored(coefficient: float, scores: Mapping[str, float]) -> SweepPoint:
    values = {name: scores.get(name, scores.get(f"edit/{name}", math.nan)) for name in ("reliability", "locality")}
    for name, value in values.items():
        if not math.isfinite(value):
            raise EditError(
                f"the score of coefficient {coefficient:g} must contain a finite {name!r}, got {value}; check that the "
                "function score returns this key."
            )
    return SweepPoint(coefficient, **values)
