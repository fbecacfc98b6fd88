"""Norm balls that hold in the dtype in which weights are stored: what rounding puts outside goes back inside.

Constrained fine-tuning as in "Modifying Memories in Transformer Models" (Zhu et al., arXiv 2012.00363): after every
step the weights are projected onto ``|w - reference| <= radius``. There the bound holds in real numbers; in bf16 the
rounding of ``reference + radius`` alone oversteps a bound of 1e-3 by a tenth. Here every comparison is made in fp64
on the values as stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kedit_train.functional.precision import widest

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SLICE = 2**24


def step_toward(values: Tensor, target: Tensor) -> Tensor:
    """The next representable value towards ``target``, as ``torch.nextafter``, for half precision on every device.

    Args:
        values, target: any shape, fp64, fp32, bf16 or fp16, finite or infinite; equal values stay.
    """
    bits = values.view(_INTEGERS[values.element_size()])
    # As integers, floats of one sign are ordered by magnitude: one more is one step away from zero.
    away = (target > values) == (values > 0)
    stepped = torch.where(away, bits + 1, bits - 1).view(values.dtype)
    smallest = torch.ones_like(bits).view(values.dtype)
    stepped = torch.where(values == 0, torch.where(target > 0, smallest, -smallest), stepped)
    return torch.where(values == target, values, stepped)


def linf_bounds(reference: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest storable value within ``radius`` of each entry.

    Clamping between them is all that a step costs. Where the spacing of the dtype exceeds the radius both are the
    reference itself.

    Args:
        reference: any shape, any float dtype; radius: 0 or more.

    Returns:
        (lower, upper), in the shape and dtype of ``reference``; ``abs(bound - reference) <= radius`` in fp64.
    """
    lower, upper = torch.empty_like(reference), torch.empty_like(reference)
    for centre, low, high in _slices(reference, lower, upper):
        low.copy_(_furthest(centre, -radius))
        high.copy_(_furthest(centre, radius))
    return lower, upper


def linf_ball(weight: Tensor, reference: Tensor, radius: float) -> Tensor:
    """Clip every entry to within ``radius`` of its reference; entries within stay as they are, bit for bit."""
    return torch.clamp(weight, *linf_bounds(reference, radius))


def _furthest(centre: Tensor, distance: float) -> Tensor:
    exact = widest(centre)
    found = (exact + distance).to(centre)
    while bool((outside := ((widest(found) - exact).abs() > abs(distance)).to(centre.device)).any()):
        found = torch.where(outside, step_toward(found, centre), found)
    return found


def norm_squared(weight: Tensor) -> Tensor:
    """The squared L2 norm of the stored values, a scalar in fp64."""
    return torch.stack([widest(w).square().sum() for (w,) in _slices(weight)]).sum()


def distance_squared(weight: Tensor, reference: Tensor) -> Tensor:
    """The squared L2 distance of the stored values, a scalar in fp64."""
    parts = [(widest(w) - widest(r)).square().sum() for w, r in _slices(weight, reference)]
    return torch.stack(parts).sum()


def shrink(weight: Tensor, reference: Tensor, factor: float) -> Tensor:
    """Move every entry towards its reference: ``reference + factor * (weight - reference)``, never further than that.

    Rounded to nearest, and where that lies further out than the exact value, to the neighbour towards the reference.

    Args:
        weight, reference: any shape, the same float dtype; factor: in [0, 1].
    """
    shrunk = torch.empty_like(reference)
    for w, r, found in _slices(weight, reference, shrunk):
        centre = widest(r)
        delta = (widest(w) - centre) * factor
        nearest = (centre + delta).to(r)
        outside = ((widest(nearest) - centre).abs() > delta.abs()).to(r.device)
        found.copy_(torch.where(outside, step_toward(nearest, r), nearest))
    return shrunk


def shrink_factor(distance: float, radius: float) -> float:
    """By what to scale a difference of this norm so that it lies within ``radius``, whichever way it is summed."""
    return 1.0 if distance <= radius else radius / distance * (1.0 - 1e-12)


def l2_ball(weights: Sequence[Tensor], references: Sequence[Tensor], radius: float) -> list[Tensor]:
    """Scale the difference of all tensors together back to a norm of at most ``radius``.

    Returns:
        New tensors; the given ones themselves where they lie within the ball.
    """
    distance = float(sum(distance_squared(w, r) for w, r in zip(weights, references, strict=True))) ** 0.5
    factor = shrink_factor(distance, radius)
    if factor == 1.0:
        return list(weights)
    return [shrink(w, r, factor) for w, r in zip(weights, references, strict=True)]


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    # Rows at a time: fp64 copies of a whole embedding matrix would cost more than the model.
    if tensors[0].ndim == 0:
        yield tensors
        return
    rows = max(1, _SLICE * len(tensors[0]) // max(1, tensors[0].numel()))
    for start in range(0, max(1, len(tensors[0])), rows):
        yield tuple(t[start : start + rows] for t in tensors)
