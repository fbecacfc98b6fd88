"""Norm balls hold in fp64 on the stored values of every dtype, and values inside stay unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit_train.functional import norm_balls as balls
from kedit_train.functional.norm_balls import l2_ball, linf_ball, linf_bounds, step_toward

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def apart(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).abs()


def values(dtype: torch.dtype, n: int = 4000) -> Tensor:
    """Return values of all magnitudes and both signs, with zeros and the greatest finite one."""
    spread = torch.randn(n) * 10.0 ** torch.randint(-6, 2, (n,))
    limits = torch.finfo(dtype)
    ends = torch.tensor([0.0, -0.0, limits.max, -limits.max, limits.tiny], dtype=torch.float64)
    return torch.cat([spread.to(dtype), ends.to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_the_next_representable_value(dtype):
    start = values(dtype)
    for target in (values(dtype).flip(0), start, torch.full_like(start, torch.inf), torch.zeros_like(start)):
        assert torch.equal(step_toward(start, target), torch.nextafter(start, target))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("radius", [5e-5, 1e-3, 0.1])
def test_linf_bounds_are_the_furthest_storable_values(dtype, radius):
    reference = values(dtype)
    lower, upper = linf_bounds(reference, radius)
    assert bool((apart(lower, reference) <= radius).all())
    assert bool((apart(upper, reference) <= radius).all())
    if dtype is torch.float64:
        return  # The comparison itself rounds.
    # One step further out is outside of the ball.
    infinity = torch.full_like(reference, torch.inf)
    assert bool((apart(torch.nextafter(upper, infinity), reference) > radius).all())
    assert bool((apart(torch.nextafter(lower, -infinity), reference) > radius).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_linf_keeps_inner_values_and_moves_the_others_to_the_bound(dtype):
    reference = torch.randn(50, 7).to(dtype)
    weight = (reference.double() + 2e-2 * torch.randn(50, 7)).to(dtype)
    bounded = linf_ball(weight, reference, 1e-2)
    within = apart(weight, reference) <= 1e-2
    assert 0 < int(within.sum()) < within.numel()
    assert torch.equal(bounded[within], weight[within])
    assert bool((apart(bounded, reference) <= 1e-2).all())
    lower, upper = linf_bounds(reference, 1e-2)
    assert torch.equal(bounded[~within], torch.where(weight > reference, upper, lower)[~within])


def test_plain_clipping_in_bf16_exceeds_the_bound_and_linf_ball_does_not():
    reference = torch.randn(10_000).bfloat16()
    weight = (reference.float() + 1.0).bfloat16()
    plain = torch.minimum(weight, reference + 1e-3)
    assert float(apart(plain, reference).max()) > 1.05e-3
    assert float(apart(linf_ball(weight, reference, 1e-3), reference).max()) <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1e-1, 3.0])
def test_l2_holds_over_all_tensors_in_fp64(dtype, size):
    references = [torch.randn(40, 30).to(dtype), torch.randn(17).to(dtype), torch.tensor(0.3, dtype=dtype)]
    weights = [(r.double() + size * torch.randn(r.shape)).to(dtype) for r in references]
    radius = 0.5 * float(sum(apart(w, r).square().sum() for w, r in zip(weights, references, strict=True))) ** 0.5
    bounded = l2_ball(weights, references, radius)
    flat = torch.cat([apart(b, r).flatten() for b, r in zip(bounded, references, strict=True)])
    for ordered in (flat, flat.sort().values, flat.flip(0)):
        assert float(ordered.norm()) <= radius
    # And it is the projection: the same direction at the full radius, up to the rounding of what is stored.
    wanted = torch.cat([(w.double() - r.double()).flatten() for w, r in zip(weights, references, strict=True)]) * 0.5
    got = torch.cat([(b.double() - r.double()).flatten() for b, r in zip(bounded, references, strict=True)])
    spacing = torch.finfo(dtype).eps * torch.cat([r.double().abs().flatten() + size * 4 for r in references])
    assert bool(((got - wanted).abs() <= spacing + 1e-11).all())


def test_l2_keeps_weights_inside_the_ball():
    weights, references = [torch.randn(3, 4)], [torch.zeros(3, 4)]
    assert l2_ball(weights, references, 1e3)[0] is weights[0]


def test_slices_change_nothing(monkeypatch):
    reference = torch.randn(50, 7).bfloat16()
    weight = reference + torch.randn(50, 7).bfloat16()
    whole = linf_ball(weight, reference, 0.1), l2_ball([weight], [reference], 0.1)[0]
    monkeypatch.setattr(balls, "_SLICE", 20)
    sliced = linf_ball(weight, reference, 0.1), l2_ball([weight], [reference], 0.1)[0]
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[1], sliced[1])
