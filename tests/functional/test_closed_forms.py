"""Losses in closed form equal the plain formulas, in values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional import (
    dynamic_cross_entropy,
    jensen_shannon,
    kl_divergence,
    overtone,
    overtone_statistics,
    overtone_target,
    smoothed_loss,
    token_divergence,
    uniform,
    uniform_target,
)
from kedit_train.functional.closed_form_losses import entropy

SIZE = 83
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def cases(spread: float = 3.0, dtype: torch.dtype = torch.float64, n: int = 60) -> tuple[Tensor, Tensor]:
    """Random rows with very different means. Half of the labels are the top token, some by far."""
    logits = (
        torch.randn(n, SIZE, dtype=torch.float64) * spread + torch.linspace(-20, 20, n, dtype=torch.float64)[:, None]
    )
    labels = torch.randint(0, SIZE, (n,))
    labels[: n // 2] = logits[: n // 2].argmax(-1)
    logits[torch.arange(n // 4), labels[: n // 4]] += torch.linspace(0, 12, n // 4, dtype=torch.float64)
    return logits.to(dtype), labels


def compared(got: Callable[..., Any], want: Callable[..., Any], logits: Tensor, tight: float) -> Tensor:
    """Compare values and gradients for uneven upstream gradients, each row within ``tight``; return the gradient.

    In lower precision than the formula's, rounding decides whether a loss within it of zero is zero.
    """
    ours, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, wanted = got(ours), want(plain)
    scale = 1.0 + wanted[0].detach().abs()
    assert ((found[0] - wanted[0]).abs() <= tight * scale).all()
    for a, b in zip(found[1:], wanted[1:], strict=True):
        decided = (wanted[0].detach() > tight) | (a == b)
        torch.testing.assert_close(a[decided], b[decided], rtol=tight, atol=tight, check_dtype=False)
        assert not a.requires_grad
    upstream = torch.linspace(-1, 2, len(logits), dtype=torch.float64)
    (found[0] * upstream).sum().backward()
    (wanted[0] * upstream).sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert ours.grad.dtype == logits.dtype
    rounding = tight + (torch.finfo(logits.dtype).eps if logits.dtype == torch.bfloat16 else 0.0)
    assert (ours.grad.double() - plain.grad).norm(dim=-1).le(rounding * (scale + plain.grad.norm(dim=-1))).all()
    return ours.grad


def tightness(dtype: torch.dtype) -> float:
    return 1e-11 if dtype == torch.float64 else 1e-5


def plain_overtone(z: Tensor, y: Tensor, *, epsilon: float, **options: Any) -> tuple[Tensor, ...]:
    target, accepted, survivors = overtone_target(z, y, **options)
    mass = target.gather(-1, y[:, None]).squeeze(-1)
    return *smoothed_loss(z, target, epsilon=epsilon), accepted, survivors, mass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize(
    ("label_weight", "epsilon", "n_sigma"),
    [(0.1, 0.05, 0.5), (0.1, 0.01, 1.0), (0.4, 0.0, math.inf), (0.0, 0.3, 2.0), (1.0, 0.0, 0.5)],
)
def test_overtone_equals_its_target(dtype, spread, label_weight, epsilon, n_sigma):
    logits, labels = cases(spread, dtype)
    options = {"label_weight": label_weight, "epsilon": epsilon, "n_sigma": n_sigma, "vocab_size": None}
    compared(
        lambda z: overtone_statistics(z, labels, **options),
        lambda z: plain_overtone(z, labels, **options),
        logits,
        tightness(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [0.0, 1.0])
@pytest.mark.parametrize("label_weight", [0.0, 0.9, 1.0])
def test_uniform_equals_its_target(dtype, epsilon, label_weight):
    logits, labels = cases(3.0, dtype)
    compared(
        lambda z: uniform(z, labels, label_weight=label_weight, epsilon=epsilon),
        lambda z: smoothed_loss(z, uniform_target(z, labels, label_weight=label_weight), epsilon=epsilon),
        logits,
        tightness(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_dft_is_cross_entropy_times_the_detached_probability(dtype, epsilon):
    logits, labels = cases(3.0, dtype)

    def formula(z: Tensor) -> tuple[Tensor, Tensor]:
        cross_entropy = F.cross_entropy(z, labels, reduction="none")
        return z.softmax(-1).gather(-1, labels[:, None])[:, 0].detach() * cross_entropy.clamp(min=epsilon), (
            cross_entropy > epsilon
        )

    gradient = compared(lambda z: dynamic_cross_entropy(z, labels, epsilon=epsilon), formula, logits, tightness(dtype))
    if dtype == torch.float64 and not epsilon:
        p = logits.softmax(-1)
        want = p.gather(-1, labels[:, None]) * (p - F.one_hot(labels, SIZE))
        torch.testing.assert_close(gradient, want * torch.linspace(-1, 2, len(logits), dtype=torch.float64)[:, None])


@pytest.mark.parametrize("fill", [0.0, 40.0, 1e4, -math.inf])
@pytest.mark.parametrize("loss", ["overtone", "uniform"])
def test_padded_rows_of_the_head_are_left_out(loss, fill):
    logits, labels = cases()
    labels[0] = SIZE + 2
    padded = F.pad(logits, (0, 7), value=fill)
    if fill == -math.inf:
        labels[0] = 0
    scored, plain = {
        "overtone": (
            lambda z: overtone(z, labels, vocab_size=SIZE),
            lambda z: plain_overtone(z, labels, epsilon=0.05, label_weight=0.1, n_sigma=0.5, vocab_size=SIZE)[:2],
        ),
        "uniform": (
            lambda z: uniform(z, labels, vocab_size=SIZE),
            lambda z: smoothed_loss(z, uniform_target(z, labels, vocab_size=SIZE)),
        ),
    }[loss]
    compared(scored, plain, padded, 1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_divergence_equals_its_formula(dtype, distance, direction):
    logits, _ = cases(3.0, dtype)
    reference = (logits.double() + distance * torch.randn(logits.shape, dtype=torch.float64)).to(dtype)

    def formula(z: Tensor) -> tuple[Tensor]:
        if direction == "jsd":
            return (jensen_shannon(reference.double(), z),)
        return (
            kl_divergence(reference.double(), z) if direction == "forward" else kl_divergence(z, reference.double()),
        )

    compared(lambda z: (token_divergence(reference, z, direction=direction),), formula, logits, tightness(dtype))


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_divergence_is_finite_if_neither_side_has_mass(direction):
    reference, model = torch.randn(2, 5, 9, dtype=torch.float64)
    want = token_divergence(reference, model, direction=direction)
    padded = F.pad(model, (0, 2), value=-math.inf).requires_grad_()
    got = token_divergence(F.pad(reference, (0, 2), value=-math.inf), padded, direction=direction)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert padded.grad is not None
    assert torch.isfinite(padded.grad).all()
    assert not padded.grad[:, 9:].any()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": lambda z, y: overtone(z, y, label_weight=1.0, epsilon=0.0)[0],
    "uniform": lambda z, y: uniform(z, y, epsilon=0.7)[0],
    **{
        d: lambda z, y, d=d: token_divergence(F.one_hot(y, z.shape[1]) * 2.0, z, direction=d)  # pyright: ignore
        for d in ("forward", "reverse", "jsd")
    },
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck(name, softcap):
    """Only for losses whose target does not depend on the model."""
    logits, labels = torch.randn(6, 11, dtype=torch.float64) * 3, torch.randint(0, 11, (6,))

    def loss(z: Tensor) -> Tensor:
        return LOSSES[name](z if softcap is None else torch.tanh(z / softcap) * softcap, labels)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


@pytest.mark.parametrize("numbers", [1, 3 * SIZE, 10**9])
def test_blocks_change_nothing(numbers, monkeypatch):
    logits, labels = cases()
    logits.requires_grad_()

    def both() -> tuple[Tensor, ...]:
        loss, *rest = overtone_statistics(
            logits, labels, label_weight=0.1, epsilon=0.05, n_sigma=0.5, vocab_size=SIZE - 3
        )
        return *rest, loss.detach(), torch.autograd.grad(loss.sum(), logits)[0], entropy(logits)

    want = both()
    monkeypatch.setattr("kedit_train.functional.closed_form_losses._BLOCK", numbers)
    for a, b in zip(both(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_entropy_equals_its_formula():
    logits, _ = cases()
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(entropy(logits), -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(entropy(F.pad(logits, (0, 3), value=-math.inf)), entropy(logits))


def test_no_rows_give_empty_outputs():
    empty, labels = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.long)
    for loss in (overtone(empty, labels)[0], uniform(empty, labels)[0], dynamic_cross_entropy(empty, labels)[0]):
        assert loss.shape == (0,)
        loss.sum().backward()
