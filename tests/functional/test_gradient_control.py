"""Control steps: they raise the value, and no change leaves its trust region, in any dtype."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from kedit_train.functional import gradient_control
from kedit_train.functional.gradient_control import ascend

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def network(size: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(size, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Flatten(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_change_is_longer_than_the_radius(dtype: torch.dtype) -> None:
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        size = int(torch.randint(1, 9, (1,), generator=generator))
        scale = 10.0 ** float(torch.randint(-4, 4, (1,), generator=generator))
        hidden = (torch.randn(5, size, generator=generator) * scale).to(dtype)
        hidden[0] = 0
        radius = 10.0 ** -float(torch.randint(0, 5, (1,), generator=generator))
        step_size = 10.0 ** float(torch.randint(-3, 9, (1,), generator=generator))
        moved = ascend(hidden, network(size), step_size=step_size, steps=seed % 4 + 1, radius=radius)
        assert moved.dtype == dtype
        change = (moved.double() - hidden.double()).norm(dim=-1)
        assert bool((change <= radius * hidden.double().norm(dim=-1)).all())
        assert torch.equal(moved[0], hidden[0])


def test_the_steps_follow_the_formula_inside_the_trust_region() -> None:
    hidden, net = torch.randn(4, 6), network(6)
    expected = hidden
    for _ in range(3):
        point = expected.clone().requires_grad_()
        expected = expected + 0.05 * torch.autograd.grad(net(point).sum(), point)[0]
    found = ascend(hidden, net, step_size=0.05, steps=3, radius=10.0)
    torch.testing.assert_close(found, expected)
    assert bool((net(found) > net(hidden)).all())


def test_a_long_step_ends_on_the_boundary_in_the_direction_of_the_gradient() -> None:
    hidden, direction = torch.randn(3, 5), torch.randn(5)
    moved = ascend(hidden, lambda h: h @ direction, step_size=1e6, steps=1, radius=0.2)
    expected = hidden + 0.2 * hidden.norm(dim=-1, keepdim=True) * direction / direction.norm()
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("step_size", [1e100, 1e160, 1e308])
def test_a_huge_step_ends_on_the_boundary(step_size: float) -> None:
    hidden, direction = torch.randn(3, 5), torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0])
    moved = ascend(hidden, lambda h: h @ direction, step_size=step_size, steps=2, radius=0.2)
    length = (moved - hidden).norm(dim=-1)
    torch.testing.assert_close(length, 0.2 * hidden.norm(dim=-1))


@pytest.mark.parametrize("zero", ["step_size", "steps", "radius"])
def test_zero_returns_the_same_tensor(zero: str) -> None:
    hidden = torch.tensor([[-0.0, 1.0]])
    options = {"step_size": 1.0, "steps": 1, "radius": 1.0} | {zero: 0}
    assert ascend(hidden, lambda h: h.sum(-1), **options) is hidden  # type: ignore[arg-type]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_without_gradients_and_leaves_no_gradient_on_the_value(context: type) -> None:
    net = network(3)
    with context():
        moved = ascend(torch.ones(2, 3), net, step_size=1.0, steps=2, radius=0.5)
    assert not moved.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    def broken(hidden: Tensor) -> Tensor:
        return (hidden * torch.tensor([float("nan"), 1.0])).sum(-1)

    moved = ascend(torch.tensor([[3.0, 4.0]]), broken, step_size=1.0, steps=1, radius=1.0)
    assert moved.tolist() == [[3.0, 5.0]]


def test_the_examples_run() -> None:
    assert doctest.testmod(gradient_control).failed == 0
