"""Chunks give what the whole gives, and never build the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional import chunk_length, chunked, overtone

N, WIDTH, VOCAB = 23, 8, 31


class Score:
    """A head and OverTone behind it, that remembers how many rows of logits it built at a time."""

    def __init__(self, dtype: torch.dtype, *, trained: bool) -> None:
        self.weight = torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=trained)
        self.rows: list[int] = []

    def __call__(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = F.linear(hidden, self.weight)
        self.rows.append(len(logits))
        loss, active = overtone(logits, labels, epsilon=5.0)
        return loss, active, logits.argmax(-1) == labels


def data(dtype: torch.dtype, n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, WIDTH, dtype=dtype), torch.randint(0, VOCAB, (n,))


def backward(loss: Tensor, upstream: Tensor, *wrt: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((loss * upstream).sum(), wrt)


@pytest.mark.parametrize("chunk", [1, 2, 7, N - 1, N, N + 50])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_equals_the_whole(chunk, frozen, weighted):
    hidden, labels = data(torch.float64)
    hidden.requires_grad_()
    score = Score(torch.float64, trained=not frozen)
    wrt = [hidden] if frozen else [hidden, score.weight]
    # Neither uniform nor positive, and not what weights= announces: the host may do with a loss what it wants.
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    want = score(hidden, labels)
    want_grads = backward(want[0], upstream, *wrt)
    assert 0 < int(want[1].sum()) < N, "some tokens clipped, some not"
    score.rows.clear()
    weights = torch.rand(N) + 0.1 if weighted else None
    got = chunked(score, hidden, labels, chunk=chunk, frozen_head=frozen, weights=weights)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
    for a, b in zip(backward(got[0], upstream, *wrt), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert max(score.rows) <= chunk, "no more than a chunk of logits at a time, forward and backward"


def test_with_a_frozen_head_nothing_is_computed_twice():
    hidden, labels = data(torch.float32)
    score = Score(torch.float32, trained=False)
    chunked(score, hidden.requires_grad_(), labels, chunk=5, frozen_head=True)[0].sum().backward()
    assert sum(score.rows) == N
    score.rows.clear()
    chunked(score, hidden, labels, chunk=5, frozen_head=False)[0].sum().backward()
    assert sum(score.rows) == 2 * N


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_kept_for_backward_is_no_logits(frozen):
    hidden, labels = data(torch.float32)
    hidden.requires_grad_()
    score = Score(torch.float32, trained=not frozen)
    kept: list[torch.Size] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        chunked(score, hidden, labels, chunk=4, frozen_head=frozen)
    outside = [shape for shape in kept if len(shape) == 2 and shape[0] == N and shape[1] == VOCAB]
    assert kept or not frozen
    assert not outside


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_carry_no_graph(frozen):
    hidden, labels = data(torch.float32)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = states.repeat(1, 4)
        return F.cross_entropy(logits, targets, reduction="none"), logits.amax(-1)

    loss, statistic = chunked(score, hidden.requires_grad_(), labels, chunk=6, frozen_head=frozen)
    assert loss.requires_grad
    assert not statistic.requires_grad


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tokens(frozen):
    hidden, labels = data(torch.float32, n=0)
    hidden.requires_grad_()
    loss, active, right = chunked(Score(torch.float32, trained=not frozen), hidden, labels, chunk=4, frozen_head=frozen)
    assert (loss.shape, active.shape, right.dtype) == ((0,), (0,), torch.bool)
    loss.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("frozen", [True, False])
def test_without_gradients(frozen):
    hidden, labels = data(torch.float64)
    score = Score(torch.float64, trained=not frozen)
    with torch.no_grad():
        want = score(hidden, labels)
        score.rows.clear()
        got = chunked(score, hidden.requires_grad_(), labels, chunk=4, frozen_head=frozen)
    assert not got[0].requires_grad
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    assert max(score.rows) == 4


def test_every_token_clipped():
    hidden, labels = data(torch.float32)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros(len(states)), targets == targets

    loss, _ = chunked(score, hidden.requires_grad_(), labels, chunk=4, frozen_head=True)
    loss.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(frozen):
    hidden, labels = data(torch.float64, n=5)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(states @ weight.t(), targets, reduction="none"),)

    def loss(states: Tensor) -> Tensor:
        return chunked(score, states, labels, chunk=2, frozen_head=frozen)[0] * torch.arange(1.0, 6.0)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(),))


def test_chunk_length_bounds_the_logits():
    assert chunk_length(151_936) * 151_936 <= 2**24 < (chunk_length(151_936) + 1) * 151_936
    assert chunk_length(2**30) == 1
