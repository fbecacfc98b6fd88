"""OverTone equals the equations of the paper, written out token by token, and cross-entropy in its limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional import overtone, overtone_target, smoothed_loss, uniform_target

LN = math.log


def by_hand(row: list[float], label: int, label_weight: float, eps: float, n: float, size: int) -> dict:
    """Compute equations 2 and 3 of arXiv 2502.00602 for one token, with the filter over the first ``size`` entries.

    ``margin`` is the distance to the nearest decision (filter, check). A test in lower precision leaves out tokens
    whose decision depends on rounding.
    """
    top = max(row[:size])
    mean = sum(row[:size]) / size
    sigma = math.sqrt(sum((x - mean) ** 2 for x in row[:size]) / (size - 1))
    bound = top - n * sigma if math.isfinite(n) else -math.inf
    survivors = [k for k in range(size) if row[k] > bound]
    if not survivors:
        survivors = [k for k in range(size) if row[k] == top]
    normaliser = sum(math.exp(row[k] - top) for k in survivors)
    mixture = [0.0] * len(row)
    for k in survivors:
        mixture[k] = (1 - label_weight) * math.exp(row[k] - top) / normaliser
    mixture[label] += label_weight
    rival = max(p for k, p in enumerate(mixture) if k != label)
    accepted = mixture[label] > rival
    target = mixture if accepted else [float(k == label) for k in range(len(row))]
    high = max(row)
    log_z = high + LN(sum(math.exp(x - high) for x in row))
    divergence = sum(t * (LN(t) - (x - log_z)) for t, x in zip(target, row, strict=True) if t > 0)
    near_bound = min(abs(x - bound) for x in row[:size]) / max(1.0, abs(top))
    return {
        "target": target,
        "accepted": accepted,
        "survivors": len(survivors),
        "loss": max(divergence, eps),
        "active": divergence > eps,
        "margin": min(near_bound, abs(mixture[label] - rival)),
    }


def cases(size: int, spread: float, dtype: torch.dtype, n: int = 40) -> tuple[Tensor, Tensor]:
    """Return random rows. Half of the labels are the top token, some by far and some barely."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(n, size, generator=generator, dtype=torch.float64) * spread
    labels = torch.randint(0, size, (n,), generator=generator)
    labels[: n // 2] = logits[: n // 2].argmax(-1)
    logits[torch.arange(n // 4), labels[: n // 4]] += torch.linspace(0, 12, n // 4, dtype=torch.float64)
    return logits.to(dtype), labels


@pytest.mark.parametrize("size", [2, 5, 97])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("label_weight", "eps", "n"),
    [(0.1, 0.05, 0.5), (0.1, 0.01, 1.0), (0.5, 0.0, math.inf), (0.0, 0.3, 2.0), (1.0, 0.05, 0.5)],
)
def test_overtone_equals_the_paper(size, spread, dtype, label_weight, eps, n):
    logits, labels = cases(size, spread, dtype)
    target, accepted, survivors = overtone_target(logits, labels, label_weight=label_weight, n_sigma=n)
    loss, active = overtone(logits, labels, label_weight=label_weight, epsilon=eps, n_sigma=n)
    tight = 1e-12 if dtype == torch.float64 else 1e-4
    compared = 0
    for i, row in enumerate(logits.double().tolist()):
        want = by_hand(row, int(labels[i]), label_weight, eps, n, size)
        # Flat rows are all ties, which both sides decide by the same rule.
        if dtype != torch.float64 and spread and want["margin"] < 1e-5:
            continue
        compared += 1
        assert bool(accepted[i]) == want["accepted"]
        assert int(survivors[i]) == want["survivors"]
        assert target[i].tolist() == pytest.approx(want["target"], rel=tight, abs=tight)
        assert float(loss[i]) == pytest.approx(want["loss"], rel=tight, abs=tight)
        assert bool(active[i]) == want["active"] or abs(float(loss[i]) - eps) < tight
    assert compared >= len(labels) // 2


def test_cases_reach_every_branch():
    seen = set()
    for size, spread in ((5, 0.3), (97, 3.0)):
        logits, labels = cases(size, spread, torch.float64)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            want = by_hand(row, label, 0.1, 0.05, 0.5, size)
            seen.add((want["accepted"], want["active"]))
    # A one-hot target is accepted only where the label is on top, so that (False, False) cannot be.
    assert seen >= {(True, True), (True, False), (False, True)}


@pytest.mark.parametrize("fill", [0.0, -40.0, 1e4, -math.inf])
def test_padded_rows_of_the_head_change_neither_filter_nor_target(fill):
    logits, labels = cases(61, 2.0, torch.float64)
    padded = F.pad(logits, (0, 7), value=fill)
    plain = overtone_target(logits, labels)
    wide = overtone_target(padded, labels, vocab_size=61)
    torch.testing.assert_close(wide[0][:, :61], plain[0], rtol=0, atol=0)
    assert torch.equal(wide[0][:, 61:], torch.zeros(len(labels), 7, dtype=torch.float64))
    assert torch.equal(wide[1], plain[1])
    assert torch.equal(wide[2], plain[2])


def test_logits_of_minus_infinity_take_no_part():
    logits, labels = cases(61, 2.0, torch.float64)
    padded = F.pad(logits, (0, 7), value=-math.inf).requires_grad_()
    loss, active = overtone(padded, labels, vocab_size=61)
    want, want_active = overtone(logits, labels)
    torch.testing.assert_close(loss, want)
    assert torch.equal(active, want_active)
    loss.sum().backward()
    assert padded.grad is not None
    assert torch.isfinite(padded.grad).all()
    assert not padded.grad[:, 61:].any()


def test_a_model_that_diverged_is_not_reported_as_learned():
    loss, active = overtone(torch.full((2, 5), math.nan), torch.tensor([1, 2]))
    assert loss.isnan().all()
    assert active.all()


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_all_weight_on_the_label_is_cross_entropy(dtype, rel):
    logits, labels = cases(211, 3.0, dtype, n=64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, _ = overtone(ours, labels, label_weight=1.0, epsilon=0.0)
    want = F.cross_entropy(theirs, labels, reduction="none")
    weights = torch.rand(len(labels), dtype=dtype)
    (loss * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(loss, want, rtol=rel, atol=rel)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert (ours.grad - theirs.grad).norm() <= rel * theirs.grad.norm()


def test_clipped_tokens_have_no_gradient_and_the_others_pi_minus_target():
    logits, labels = cases(41, 2.0, torch.float64, n=80)
    logits.requires_grad_()
    target, _, _ = overtone_target(logits, labels)
    loss, active = overtone(logits, labels)
    loss.sum().backward()
    assert 0 < int(active.sum()) < len(active)
    assert logits.grad is not None
    assert torch.equal(logits.grad[~active], torch.zeros_like(logits.grad[~active]))
    torch.testing.assert_close(logits.grad[active], (logits.softmax(-1) - target)[active].detach())


def test_a_divergence_of_exactly_epsilon_is_clipped():
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    exact = float(smoothed_loss(logits, target)[0].detach())
    loss, active = smoothed_loss(logits, target, epsilon=exact)
    assert not active.any()
    loss.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_gradcheck(epsilon):
    logits, labels = cases(13, 1.5, torch.float64, n=12)
    target, _, _ = overtone_target(logits, labels)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: smoothed_loss(z, target, epsilon=epsilon)[0], (logits,))


def test_the_target_is_a_distribution_without_a_graph():
    logits, labels = cases(97, 3.0, torch.bfloat16)
    target, accepted, survivors = overtone_target(logits.requires_grad_(), labels)
    assert not any(t.requires_grad for t in (target, accepted, survivors))
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.sum(-1), torch.ones(len(labels)))
    assert torch.equal(target.argmax(-1), labels)


def test_a_tie_of_the_label_is_not_accepted():
    logits = torch.tensor([[2.0, 2.0, -1.0]], dtype=torch.float64)
    _, accepted, survivors = overtone_target(logits, torch.tensor([0]), label_weight=0.0, n_sigma=0.5)
    assert (bool(accepted), int(survivors)) == (False, 2)


@pytest.mark.parametrize("vocab_size", [None, 11])
def test_the_uniform_target_is_label_smoothing(vocab_size):
    logits, labels = cases(13, 1.0, torch.float64)
    size = vocab_size or 13
    labels = labels % size
    target = uniform_target(logits, labels, label_weight=0.8, vocab_size=vocab_size)
    for row, label in zip(target.tolist(), labels.tolist(), strict=True):
        assert row == pytest.approx([0.2 / size * (k < size) + 0.8 * (k == label) for k in range(13)])
    if vocab_size is None:
        ours = smoothed_loss(logits, target)[0] - torch.special.xlogy(target, target).sum(-1)
        want = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
        torch.testing.assert_close(ours, want)
