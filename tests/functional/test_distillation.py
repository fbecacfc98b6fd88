"""The distillation loss equals its definition: KL over k + 1 buckets where there is a teacher, else cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch

from kedit_train.functional.distillation import distillation
from kedit_train.functional.top_k_divergence import bucket_divergence, top_log_probs


def by_hand(teacher: list[float], student: list[float], label: int, k: int, taught: bool) -> float:
    if not taught:
        return -math.log(student[label])
    top = sorted(range(len(teacher)), key=lambda i: -teacher[i])[:k]
    pairs = [(teacher[i], student[i]) for i in top]
    pairs.append(
        (math.fsum(teacher) - math.fsum(p for p, _ in pairs), math.fsum(student) - math.fsum(q for _, q in pairs))
    )
    return math.fsum(p * math.log(p / q) for p, q in pairs)


@pytest.mark.parametrize("k", [1, 4, 18])
@pytest.mark.parametrize("epsilon", [0.0, 1.5])
def test_it_equals_its_definition(k, epsilon):
    teacher, student = torch.randn(2, 10, 19, dtype=torch.float64) * 2
    labels, taught = torch.arange(10), torch.arange(10) % 3 != 0
    loss, active = distillation(student, labels, *top_log_probs(teacher, k), taught, epsilon=epsilon)
    p, q = teacher.softmax(-1).tolist(), student.softmax(-1).tolist()
    want = [by_hand(p[i], q[i], i, k, bool(taught[i])) for i in range(10)]
    assert loss.tolist() == pytest.approx([max(value, epsilon) for value in want], rel=1e-9)
    assert active.tolist() == [value > epsilon for value in want]


def test_without_a_teacher_it_is_cross_entropy_and_the_rows_of_the_teacher_do_not_matter():
    logits = torch.randn(6, 19, requires_grad=True)
    labels, nothing = torch.arange(6), torch.zeros(6, dtype=torch.bool)
    loss, _ = distillation(logits, labels, *top_log_probs(torch.randn(6, 19), 3), nothing)
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss, want)
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (loss, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 19])
def test_it_equals_the_bucket_divergence_with_its_gradient(k, dtype):
    # The first rows are far from the teacher, so that the model gives its tokens almost no probability.
    logits = torch.randn(12, 19, dtype=dtype) * torch.linspace(60.0, 1.0, 12, dtype=dtype).unsqueeze(-1)
    logits.requires_grad_()
    log_probs, tokens = top_log_probs(torch.randn(12, 19, dtype=dtype), k)
    everywhere, weights = torch.ones(12, dtype=torch.bool), torch.rand(12, dtype=dtype)
    loss, active = distillation(logits, torch.arange(12), log_probs, tokens, everywhere, epsilon=0.3)
    want = bucket_divergence(log_probs, tokens, logits)
    torch.testing.assert_close(loss, want.clamp(min=0.3))
    got, expected = (torch.autograd.grad((x * weights).sum(), logits)[0] for x in (loss, want))
    torch.testing.assert_close(got, expected * active.unsqueeze(-1), atol=1e-6, rtol=1e-5)


def test_the_loss_and_the_gradient_are_zero_at_the_teacher():
    logits = torch.randn(5, 19, dtype=torch.float64, requires_grad=True)
    everywhere = torch.ones(5, dtype=torch.bool)
    loss, _ = distillation(logits, torch.arange(5), *top_log_probs(logits.detach(), 4), everywhere)
    assert loss.abs().max() < 1e-12
    assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-12


@pytest.mark.parametrize("k", [3, 9])
def test_gradcheck(k):
    log_probs, tokens = top_log_probs(torch.randn(4, 9, dtype=torch.float64), k)
    taught = torch.tensor([True, False, True, True])
    student = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: distillation(x, torch.arange(4), log_probs, tokens, taught)[0], student)
