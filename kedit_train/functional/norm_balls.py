"""Project weights onto norm balls, exactly in the dtype in which the weights are stored.

The projection makes sure that ``|w - reference| <= radius``. In bf16, rounding can move a projected weight out of this
ball. For a radius of 1e-3, the distance from the reference can be 10% larger than the radius. Therefore, this module
compares the rounded values in fp64, and moves values that are outside the ball back inside.

References:
    "Modifying Memories in Transformer Models", arXiv 2012.00363.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kedit_train.functional.precision import widest

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SLICE = 2**24


def step_toward(values: Tensor, target: Tensor) -> Tensor:
    """Return the next representable value towards ``target``, like ``torch.nextafter`` but on every device.

    Args:
        values: any shape; fp64, fp32, bf16 or fp16.
        target: the same shape and dtype. Values that equal their target do not change.

    Returns:
        The same shape and dtype.
    """
    bits = values.view(_INTEGERS[values.element_size()])
    # If the bits of floats with the same sign are read as integers, the integers are ordered by magnitude. So adding
    # one is a step away from zero.
    away = (target > values) == (values > 0)
    stepped = torch.where(away, bits + 1, bits - 1).view(values.dtype)
    smallest = torch.ones_like(bits).view(values.dtype)
    stepped = torch.where(values == 0, torch.where(target > 0, smallest, -smallest), stepped)
    return torch.where(values == target, values, stepped)


def linf_bounds(reference: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return ``reference - radius`` and ``reference + radius``, rounded towards the reference.

    To keep weights in the ball, clamp the weights to these bounds after each step. If ``radius`` is too small for the
    precision of an entry, both bounds equal the entry.

    Args:
        reference: any shape, any float dtype.
        radius: 0 or more.

    Returns:
        Lower and upper bounds in the shape and dtype of ``reference``; ``abs(bound - reference) <= radius`` in fp64.
    """
    lower, upper = torch.empty_like(reference), torch.empty_like(reference)
    for center, low, high in _slices(reference, lower, upper):
        low.copy_(_furthest(center, -radius))
        high.copy_(_furthest(center, radius))
    return lower, upper


def linf_ball(weight: Tensor, reference: Tensor, radius: float) -> Tensor:
    """Clip every entry, so that its distance from the reference is at most ``radius``.

    An entry that is already within this distance does not change.

    Args:
        weight: any shape and float dtype.
        reference: the same shape and dtype.
        radius: 0 or more.

    Returns:
        The same shape and dtype.
    """
    return torch.clamp(weight, *linf_bounds(reference, radius))


def _furthest(center: Tensor, distance: float) -> Tensor:
    exact = widest(center)
    candidate = (exact + distance).to(center)
    while bool((outside := ((widest(candidate) - exact).abs() > abs(distance)).to(center.device)).any()):
        candidate = torch.where(outside, step_toward(candidate, center), candidate)
    return candidate


def norm_squared(weight: Tensor) -> Tensor:
    """Return the squared L2 norm of the stored values, a scalar in fp64."""
    return torch.stack([widest(w).square().sum() for (w,) in _slices(weight)]).sum()


def distance_squared(weight: Tensor, reference: Tensor) -> Tensor:
    """Return the squared L2 distance between two tensors, as a scalar in fp64."""
    parts = [(widest(w) - widest(r)).square().sum() for w, r in _slices(weight, reference)]
    return torch.stack(parts).sum()


def shrink(weight: Tensor, reference: Tensor, factor: float) -> Tensor:
    """Return ``reference + factor * (weight - reference)``.

    Rounding never increases the distance between an entry and its reference.

    Args:
        weight: any shape and float dtype.
        reference: the same shape and dtype.
        factor: in [0, 1].

    Returns:
        The same shape and dtype.
    """
    shrunk = torch.empty_like(reference)
    for w, r, result in _slices(weight, reference, shrunk):
        center = widest(r)
        delta = (widest(w) - center) * factor
        nearest = (center + delta).to(r)
        outside = ((widest(nearest) - center).abs() > delta.abs()).to(r.device)
        result.copy_(torch.where(outside, step_toward(nearest, r), nearest))
    return shrunk


def shrink_factor(distance: float, radius: float) -> float:
    """Return the factor that scales a difference of norm ``distance`` to at most ``radius``.

    The factor is smaller than necessary by a fraction of 1e-12. This margin covers the rounding error of the norm,
    which depends on the order of summation.
    """
    return 1.0 if distance <= radius else radius / distance * (1.0 - 1e-12)


def l2_ball(weights: Sequence[Tensor], references: Sequence[Tensor], radius: float) -> list[Tensor]:
    """Scale all differences from the references by one factor, so that their joint L2 norm is at most ``radius``.

    Args:
        weights: tensors of any shape and float dtype.
        references: one tensor of the same shape and dtype for each weight.
        radius: 0 or more.

    Returns:
        New tensors, or the given tensors if the joint norm is at most ``radius``.
    """
    distance = float(sum(distance_squared(w, r) for w, r in zip(weights, references, strict=True))) ** 0.5
    factor = shrink_factor(distance, radius)
    if factor == 1.0:
        return list(weights)
    return [shrink(w, r, factor) for w, r in zip(weights, references, strict=True)]


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    # The rows are processed in slices, because an fp64 copy of a whole embedding matrix can be larger than the model.
    if tensors[0].ndim == 0:
        yield tensors
        return
    rows = max(1, _SLICE * len(tensors[0]) // max(1, tensors[0].numel()))
    for start in range(0, max(1, len(tensors[0])), rows):
        yield tuple(t[start : start + rows] for t in tensors)
