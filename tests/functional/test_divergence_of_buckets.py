"""The divergence over k + 1 buckets equals its definition, summed entry by entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kedit_train.functional import token_divergence
from kedit_train.functional.top_k_divergence import bucket_divergence, top_log_probs

DIRECTIONS: list[Any] = ["forward", "reverse", "jsd"]


def buckets(row: list[float], tokens: list[int]) -> list[float]:
    return [row[i] for i in tokens] + [math.fsum(p for i, p in enumerate(row) if i not in tokens)]


def by_hand(p: list[float], q: list[float], direction: str) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if direction == "jsd":
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (kl(p, middle) + kl(q, middle)) / 2
    return kl(p, q) if direction == "forward" else kl(q, p)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [1, 5, 30, 31])
def test_bucket_divergence_equals_its_definition(direction, k):
    teacher, student = torch.randn(2, 12, 31, dtype=torch.float64) * 3
    reference, tokens = top_log_probs(teacher, k)
    got = bucket_divergence(reference, tokens, student, direction=direction)
    rows = zip(teacher.softmax(-1).tolist(), student.softmax(-1).tolist(), strict=True)
    for i, (p, q) in enumerate(rows):
        top = sorted(range(31), key=lambda j: -p[j])[:k]
        assert tokens[i].tolist() == top
        want = by_hand(buckets(p, top)[: None if k < 31 else -1], buckets(q, top)[: None if k < 31 else -1], direction)
        assert float(got[i]) == pytest.approx(want, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bucket_divergence_grows_with_k(direction):
    teacher, student = torch.randn(2, 50, 31, dtype=torch.float64) * 3
    whole = token_divergence(teacher, student, direction=direction)
    last = torch.zeros(50, dtype=torch.float64)
    for k in range(1, 32):
        now = bucket_divergence(*top_log_probs(teacher, k), student, direction=direction)
        assert bool((now >= last - 1e-12).all())
        last = now
    torch.testing.assert_close(last, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [3, 9])
def test_gradcheck(direction, k):
    reference, tokens = top_log_probs(torch.randn(4, 9, dtype=torch.float64), k)
    student = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bucket_divergence(reference, tokens, x, direction=direction), student)


def test_a_very_small_rest_is_kept():
    logits = torch.tensor([[0.0, -60.0, -61.0]])
    reference, _ = top_log_probs(logits, 1)
    assert float(reference[0, 1]) == pytest.approx(-60 + math.log(1 + math.exp(-1)), rel=1e-6)
