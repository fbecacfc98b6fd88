"""Divergences equal their definitions, summed entry by entry."""

from __future__ import annotations

import math

import pytest
import torch

from kedit_train.functional import jensen_shannon, kl_divergence, token_divergence

DIRECTIONS = ["forward", "reverse", "jsd"]


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def by_hand(reference: list[float], model: list[float], direction: str) -> float:
    p, q = softmax(reference), softmax(model)
    if direction == "jsd":
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (kl(p, middle) + kl(q, middle)) / 2
    return kl(p, q) if direction == "forward" else kl(q, p)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
@pytest.mark.parametrize(("dtype", "tight"), [(torch.float64, 1e-11), (torch.float32, 3e-6), (torch.bfloat16, 3e-6)])
def test_divergence_equals_its_definition(direction, spread, dtype, tight):
    p, q = (torch.randn(30, 57, dtype=torch.float64).mul(spread).to(dtype) for _ in range(2))
    got = token_divergence(p, q, direction=direction)
    want = [by_hand(a, b, direction) for a, b in zip(p.double().tolist(), q.double().tolist(), strict=True)]
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.tolist() == pytest.approx(want, rel=tight, abs=tight)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergence_of_a_distribution_from_itself_is_zero(direction, dtype):
    p = torch.randn(200, 97).mul(8).to(dtype)
    assert float(token_divergence(p, p.clone(), direction=direction).abs().max()) < 1e-7


def test_forward_and_reverse_mirror_each_other_and_jsd_is_symmetric():
    p, q = torch.randn(2, 20, 31, dtype=torch.float64) * 3
    assert torch.equal(token_divergence(p, q, direction="forward"), token_divergence(q, p, direction="reverse"))
    torch.testing.assert_close(jensen_shannon(p, q), jensen_shannon(q, p), rtol=1e-12, atol=1e-12)
    assert (kl_divergence(p, q) - kl_divergence(q, p)).abs().min() > 0


def test_jsd_is_at_most_ln_2_and_reaches_it():
    p, q = torch.randn(2, 300, 31, dtype=torch.float64) * 50
    values = jensen_shannon(p, q)
    assert float(values.max()) <= math.log(2) + 1e-12
    assert float(values.min()) >= 0
    apart = jensen_shannon(torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]]))
    assert float(apart) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_of_minus_infinity_give_finite_values(direction):
    p = torch.tensor([[1.0, 2.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[2.0, 1.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    got = token_divergence(p, q, direction=direction)
    assert got.item() == pytest.approx(by_hand([1.0, 2.0], [2.0, 1.0], direction))
    got.sum().backward()
    assert p.grad is not None
    assert q.grad is not None
    assert torch.isfinite(p.grad).all()
    assert torch.isfinite(q.grad).all()


def test_mass_only_on_one_side_gives_infinity():
    p = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[2.0, 1.0, -math.inf]], dtype=torch.float64)
    assert kl_divergence(p, q).item() == math.inf
    assert kl_divergence(q, p).item() == pytest.approx(kl(softmax([2.0, 1.0]), softmax([1.0, 2.0, 0.0])[:2]))
    a, b = softmax([1.0, 2.0, 0.0]), [*softmax([2.0, 1.0]), 0.0]
    middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    assert jensen_shannon(p, q).item() == pytest.approx((kl(a, middle) + kl(b, middle)) / 2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction):
    p, q = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True).unbind()
    p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: token_divergence(a, b, direction=direction), (p, q))


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match=r"^direction must be 'forward', 'reverse' or 'jsd', got 'sideways'$"):
        token_divergence(torch.zeros(1, 2), torch.zeros(1, 2), direction="sideways")  # pyright: ignore[reportArgumentType]
