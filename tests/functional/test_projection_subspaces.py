"""Null-space and low-curvature projections equal dense projections from the formulas, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit_train.functional.low_curvature import high_curvature, project_low_curvature
from kedit_train.functional.null_space import (
    free_space,
    join_directions,
    principal_directions,
    project_free,
    project_gradient_free,
)


def inputs(n: int, d: int, decay: float = 0.5) -> Tensor:
    """Return inputs [n, d] whose energy falls by ``decay`` from direction to direction."""
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    return torch.randn(n, d, dtype=torch.float64) * decay ** torch.arange(d) @ basis


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 0.9999])
def test_the_fewest_directions_with_enough_energy_are_taken(energy):
    keys = inputs(200, 12)
    moment = keys.T @ keys / len(keys)
    directions = principal_directions(moment, energy=energy)
    torch.testing.assert_close(directions.T @ directions, torch.eye(directions.shape[1], dtype=torch.float64))

    def held(some: Tensor) -> float:
        return float((keys @ some).square().sum() / keys.square().sum())

    assert held(directions) >= energy > held(directions[:, :-1])


def test_full_energy_takes_the_span_of_the_inputs():
    keys = torch.randn(5, 9)
    moment = keys.T @ keys / 5
    directions = principal_directions(moment, energy=1.0)
    assert directions.shape == (9, 5)
    torch.testing.assert_close((keys.double() @ directions) @ directions.T, keys.double(), atol=1e-5, rtol=1e-5)
    assert principal_directions(torch.zeros(4, 4)).shape == (4, 0)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bound_of_the_rank_changes_nothing_but_the_time(energy, dtype):
    generator = torch.Generator().manual_seed(3)
    # Vectors of very different lengths, as the inputs of language models are.
    vectors = torch.randn(40, 100, generator=generator, dtype=dtype) * torch.logspace(1, -1, 40, dtype=dtype)[:, None]
    moment = vectors.T @ vectors / 40
    whole = principal_directions(moment, energy=energy)
    bounded = principal_directions(moment, energy=energy, rank=40)
    assert bounded.shape == whole.shape
    # In fp32, the moment itself has a rounding error, which matters for the directions with the least energy.
    assert (bounded @ bounded.T - whole @ whole.T).abs().max() < (1e-9 if dtype == torch.float64 else 1e-3)
    assert (bounded.T @ bounded - torch.eye(bounded.shape[1])).abs().max() < 1e-12


def test_directions_of_a_changed_moment_follow_from_the_last_ones():
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(1, -1.5, 300, dtype=torch.float64)
    moment = torch.zeros(300, 300, dtype=torch.float64)
    start = None
    for _ in range(40):
        tokens = torch.randn(8, 300, generator=generator, dtype=torch.float64) * scales
        tokens += torch.randn(1, 300, generator=generator, dtype=torch.float64) * 0.3
        moment += tokens.T @ tokens
        exact = principal_directions(moment, energy=0.9)
        start = principal_directions(moment, energy=0.9, start=start)
        torch.testing.assert_close(start.T @ start, torch.eye(start.shape[1], dtype=torch.float64))
        assert float((start.T @ moment @ start).trace() / moment.trace()) >= 0.9 - 1e-12
        assert exact.shape[1] <= start.shape[1] <= exact.shape[1] + 2


def test_directions_of_another_moment_are_not_trusted():
    first, second = (torch.diag(torch.cat([torch.ones(10), torch.zeros(190)]).roll(shift)) for shift in (0, 100))
    start = principal_directions(first, energy=0.9)
    # No direction of the first moment has energy in the second one, and all directions of the second one are equal.
    found = principal_directions(second * torch.arange(1.0, 201.0), energy=1.0, start=start)
    assert found.shape[1] == 10
    torch.testing.assert_close(found @ found.T, second.double())


def test_joined_directions_span_both_and_nothing_else():
    first, both = torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64))[0], torch.randn(10, 5, dtype=torch.float64)
    both[:, :2] = first @ torch.randn(3, 2, dtype=torch.float64)
    second = torch.linalg.qr(both)[0]
    joined = join_directions(first, second)
    assert joined.shape == (10, 6)
    torch.testing.assert_close(joined.T @ joined, torch.eye(6, dtype=torch.float64))
    for one in (first, second):
        torch.testing.assert_close(joined @ (joined.T @ one), one)


@pytest.mark.parametrize("rank", [0, 1, 5, 6, 11, 12])
def test_the_low_rank_form_equals_the_dense_projector(rank):
    directions = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0][:, :rank]
    delta = torch.randn(7, 12, dtype=torch.float64)
    dense = delta @ (torch.eye(12, dtype=torch.float64) - directions @ directions.T)
    space = free_space(directions, torch.float64)
    torch.testing.assert_close(project_free(delta, space), dense)
    assert space.basis.shape[1] <= 6
    assert space.rank == rank
    single = free_space(directions)
    found = project_free(delta.float(), single)
    assert found.dtype is torch.float32
    assert float((found.double() @ directions).norm()) < 1e-6 * float(delta.norm())


def test_the_projection_is_computed_in_fp32_under_autocast():
    directions = torch.linalg.qr(torch.randn(64, 20, dtype=torch.float64))[0]
    delta, space = torch.randn(32, 64), free_space(directions)
    alone = project_free(delta, space)
    own = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (delta @ space.basis).dtype is torch.bfloat16
            assert torch.equal(project_free(delta, space), alone)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(own)


def spd(size: int) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (2, 7), (4, 4)])
@pytest.mark.parametrize("energy", [0.2, 0.8, 0.99])
def test_low_curvature_equals_the_dense_gauss_newton_projector(shape, energy):
    out, into = shape
    gradients, activations = spd(out), spd(into)
    # Column-major vec: vec(S D A) = (A (x) S) vec(D).
    dense = torch.kron(activations, gradients)
    delta = torch.randn(out, into, dtype=torch.float64)
    vec = delta.T.flatten()
    torch.testing.assert_close(dense @ vec, (gradients @ delta @ activations).T.flatten())
    values, vectors = torch.linalg.eigh(dense)
    values, vectors = values.flip(0), vectors.flip(1)
    held = values.cumsum(0) / values.sum()
    threshold = values[int((held < energy).sum())]
    low = vectors[:, values < threshold * (1 - 1e-12)]
    wanted = (low @ (low.T @ vec)).reshape(into, out).T

    found = high_curvature(gradients, activations, energy, torch.float64)
    torch.testing.assert_close(project_low_curvature(delta, found), wanted)
    assert found.free == pytest.approx(low.shape[1] / (out * into))
    assert found.energy == pytest.approx(float(values[values >= threshold * (1 - 1e-12)].sum() / values.sum()))
    assert found.energy >= energy


def test_low_curvature_equals_the_masked_form_of_the_paper():
    gradients, activations = spd(6), spd(5)
    s, u = torch.linalg.eigh(gradients)
    a, v = torch.linalg.eigh(activations)
    products = torch.outer(s, a)
    ordered = products.flatten().sort(descending=True).values
    threshold = ordered[int((ordered.cumsum(0) < 0.9 * ordered.sum()).sum())]
    delta = torch.randn(6, 5, dtype=torch.float64)
    wanted = u @ ((u.T @ delta @ v) * (products < threshold)) @ v.T
    found = high_curvature(gradients, activations, 0.9, torch.float64)
    torch.testing.assert_close(project_low_curvature(delta, found), wanted)
    # Inputs and outputs are not exchangeable, square or not.
    square = torch.randn(5, 5, dtype=torch.float64)
    one = project_low_curvature(square, high_curvature(gradients[:5, :5], activations, 0.9, torch.float64))
    other = project_low_curvature(square, high_curvature(activations, gradients[:5, :5], 0.9, torch.float64))
    assert float((one - other).norm()) > 0.1
    # A projection: nothing more to take out, and nothing added.
    torch.testing.assert_close(project_low_curvature(wanted, found), wanted)


def test_zero_curvature_is_an_error():
    with pytest.raises(ValueError, match="zero in every direction"):
        high_curvature(torch.zeros(3, 3), spd(4), 0.9)


@pytest.mark.parametrize("rank", [20, 200])
@pytest.mark.parametrize("tokens", [0, 1, 40, 60, 300])
def test_the_gradient_of_few_tokens_is_projected_like_any_other_change(rank, tokens):
    directions = torch.linalg.qr(torch.randn(270, 270, dtype=torch.float64))[0][:, :rank]
    # The tokens have very different weights, as in the gradient of a language model.
    weights = torch.logspace(1, -3, max(tokens, 1), dtype=torch.float64)[:tokens]
    gradient = (torch.randn(300, tokens, dtype=torch.float64) * weights) @ torch.randn(tokens, 270, dtype=torch.float64)
    space = free_space(directions)
    found = project_gradient_free(gradient.float(), space)
    dense = gradient @ (torch.eye(270, dtype=torch.float64) - directions @ directions.T)
    assert found.dtype is torch.float32
    assert float((found.double() - dense).norm()) <= 2e-6 * float(gradient.norm())
    assert float((found.double() @ directions).norm()) <= 2e-6 * float(gradient.norm())


def test_a_gradient_that_is_not_finite_stays_so():
    space = free_space(torch.linalg.qr(torch.randn(270, 20, dtype=torch.float64))[0])
    gradient = torch.randn(300, 270)
    gradient[3, 5] = float("nan")
    assert bool(project_gradient_free(gradient, space).isnan().any())
