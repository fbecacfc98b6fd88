"""Losses in chunks equal the loss over all tokens at once, without its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kedit_train.functional import chunk_length, chunked, overtone
from kedit_train.functional.chunked_linear import linear

N, WIDTH, VOCAB = 23, 8, 31


class Score:
    """A head and OverTone; records how many rows of logits it builds at a time."""

    def __init__(self, dtype: torch.dtype, *, trained: bool) -> None:
        self.weight = torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=trained)
        self.trained = [self.weight] if trained else []
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
def test_chunks_equal_the_whole(chunk, frozen):
    hidden, labels = data(torch.float64)
    hidden.requires_grad_()
    score = Score(torch.float64, trained=not frozen)
    wrt = [hidden] if frozen else [hidden, score.weight]
    # Neither uniform nor positive: the host may do with a loss what it wants.
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    want = score(hidden, labels)
    want_grads = backward(want[0], upstream, *wrt)
    assert 0 < int(want[1].sum()) < N, "some tokens clipped, some not"
    score.rows.clear()
    got = chunked(score, hidden, labels, chunk=chunk, parameters=score.trained)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
    for a, b in zip(backward(got[0], upstream, *wrt), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert max(score.rows) <= chunk, "no more than a chunk of logits at a time, forward and backward"


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, lambda loss: 3 * (loss * torch.ones(N)).sum()])
def test_nothing_is_computed_twice_with_equal_weights(frozen, reduce):
    hidden, labels = data(torch.float64)
    score = Score(torch.float64, trained=not frozen)
    wrt = [hidden.requires_grad_(), *score.trained]
    want = torch.autograd.grad(reduce(score(hidden, labels)[0]), wrt)
    score.rows.clear()
    got = torch.autograd.grad(reduce(chunked(score, hidden, labels, chunk=5, parameters=score.trained)[0]), wrt)
    assert sum(score.rows) == N
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_deferred_gradients_have_the_scale_of_the_host(frozen):
    hidden, labels = data(torch.float64)
    score, seen = Score(torch.float64, trained=not frozen), []

    def spied(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        loss, *statistics = score(states, targets)
        if loss.requires_grad:
            loss.register_hook(seen.append)
        return loss, *statistics

    wrt = [hidden.requires_grad_(), *score.trained]
    want = torch.autograd.grad(score(hidden, labels)[0].sum() / 7, wrt)
    loss, *_ = chunked(spied, hidden, labels, chunk=5, parameters=score.trained, defer=True)
    assert not seen
    got = torch.autograd.grad(loss.sum() / 7, wrt)
    assert torch.equal(torch.cat(seen), torch.full((N,), 1 / 7, dtype=torch.float64))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", ["even", "uneven"])
def test_a_retained_graph_allows_a_second_backward_pass(first):
    hidden, labels = data(torch.float64)
    score = Score(torch.float64, trained=True)
    wrt = [hidden.requires_grad_(), score.weight]
    loss, *_ = chunked(score, hidden, labels, chunk=5, parameters=score.trained)
    want = score(hidden, labels)[0]
    even, uneven = torch.ones(N, dtype=torch.float64), torch.linspace(-1, 2, N, dtype=torch.float64)
    for upstream in (even, uneven, even) if first == "even" else (uneven, even, uneven):
        got = torch.autograd.grad((loss * upstream).sum(), wrt, retain_graph=True)
        for a, b in zip(got, torch.autograd.grad((want * upstream).sum(), wrt, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", ["hidden", "head", "neither"])
def test_only_trained_tensors_get_a_gradient(needed):
    hidden, labels = data(torch.float64)
    score = Score(torch.float64, trained=needed == "head")
    loss, *_ = chunked(
        score, hidden.requires_grad_(needed == "hidden"), labels, chunk=5, parameters=[score.weight, torch.ones(3)]
    )
    assert loss.requires_grad == (needed != "neither")
    if needed != "neither":
        loss.sum().backward()
        assert (hidden.grad is None, score.weight.grad is None) == (needed != "hidden", needed != "head")


def test_an_unused_tensor_has_no_gradient():
    hidden, labels = data(torch.float64)
    score, other = Score(torch.float64, trained=True), torch.ones(3, requires_grad=True)
    chunked(score, hidden, labels, chunk=5, parameters=[other, *score.trained])[0].sum().backward()
    assert other.grad is None
    assert score.weight.grad is not None


@pytest.mark.parametrize("upstream", [torch.ones(N), torch.linspace(-1, 2, N)])
@pytest.mark.parametrize("defer", [False, True])
def test_both_passes_draw_the_same_random_numbers(upstream, defer):
    hidden, labels = data(torch.float32)
    down, up = torch.randn(3, WIDTH, requires_grad=True), torch.randn(VOCAB, 3, requires_grad=True)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = F.linear(F.linear(F.dropout(states, 0.5), down), up)
        return (F.cross_entropy(logits, targets, reduction="none"),)

    wrt = [hidden.requires_grad_(), down, up]
    torch.manual_seed(3)
    want = torch.cat([score(h, y)[0] for h, y in zip(hidden.split(5), labels.split(5), strict=True)])
    torch.manual_seed(3)
    (loss,) = chunked(score, hidden, labels, chunk=5, parameters=[down, up], defer=defer)
    state = torch.get_rng_state()
    wanted = torch.autograd.grad((want * upstream).sum(), wrt)
    for a, b in zip(torch.autograd.grad((loss * upstream).sum(), wrt), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_a_linear_head_are_summed_in_place(dtype, monkeypatch):
    monkeypatch.setattr("kedit_train.functional.chunked_linear._BLOCK", 64)
    n, width, vocab = 60, 16, 300
    weight, bias = torch.randn(vocab, width).to(dtype).requires_grad_(), torch.randn(vocab).to(dtype).requires_grad_()
    hidden = torch.randn(n, width).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (n,))

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(linear(states, weight, bias, dtype).float(), targets, reduction="none"),)

    wrt = [hidden, weight, bias]
    wide = [t.detach().double().requires_grad_() for t in wrt]
    want = torch.autograd.grad(F.cross_entropy(F.linear(*wide), labels, reduction="sum"), wide)
    made: list[torch.Size] = []

    class Remember(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func._schema.is_mutable and not func.is_view:
                made.append(out.shape)
            return out

    with Remember():
        (loss,) = chunked(score, hidden, labels, chunk=4, parameters=[weight, bias])
        got = torch.autograd.grad(loss.sum(), wrt)
    tight = 1e-5 if dtype is torch.float32 else 2e-2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tight * b.norm()
    # The sum itself, and in half precision what it is rounded to; not one for each of the 15 chunks.
    assert made.count(torch.Size([vocab, width])) <= 2
    assert max((s.numel() for s in made if s != (vocab, width)), default=0) <= max(4 * vocab, n * width)


def test_a_trained_head_missing_from_the_parameters_is_an_error():
    hidden, labels = data(torch.float32)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(linear(states, weight, None, torch.float32), targets, reduction="none"),)

    with pytest.raises(ValueError, match=r"^a trained weight of the projection is missing in chunked"):
        chunked(score, hidden.requires_grad_(), labels, chunk=5)


@pytest.mark.parametrize("head", ["weight and bias", "factors", "tied"])
def test_gradcheck_of_a_trained_head(head):
    hidden, labels = data(torch.float64, n=5)
    shapes = {"weight and bias": [(7, WIDTH), (7,)], "factors": [(2, WIDTH), (7, 2)], "tied": [(7, WIDTH)]}
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes[head]]
    labels, fixed = labels % 7, torch.randn(7, WIDTH, dtype=torch.float64)
    even = torch.ones(5, dtype=torch.float64)

    def run(upstream: Tensor, states: Tensor, *head_tensors: Tensor) -> Tensor:
        def score(part: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            if head == "factors":
                logits = part @ fixed.t() + part @ head_tensors[0].t() @ head_tensors[1].t()
            else:
                logits = linear(part, head_tensors[0], (*head_tensors, None)[1], torch.float64)
            return (overtone(logits, targets, label_weight=1.0, epsilon=0.0)[0],)

        states = states + head_tensors[0][labels] if head == "tied" else states
        return (chunked(score, states, labels, chunk=2, parameters=head_tensors)[0] * upstream).sum()

    for upstream in (even, torch.arange(1.0, 6.0, dtype=torch.float64)):
        assert torch.autograd.gradcheck(lambda *t, u=upstream: run(u, *t), (hidden.requires_grad_(), *tensors))


@pytest.mark.parametrize("frozen", [True, False])
def test_no_logits_are_kept_for_the_backward_pass(frozen):
    hidden, labels = data(torch.float32)
    hidden.requires_grad_()
    score = Score(torch.float32, trained=not frozen)
    kept: list[torch.Size] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        chunked(score, hidden, labels, chunk=4, parameters=score.trained)
    outside = [shape for shape in kept if len(shape) == 2 and shape[0] == N and shape[1] == VOCAB]
    assert kept or not frozen
    assert not outside


def test_statistics_carry_no_graph():
    hidden, labels = data(torch.float32)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = states.repeat(1, 4)
        return F.cross_entropy(logits, targets, reduction="none"), logits.amax(-1)

    loss, statistic = chunked(score, hidden.requires_grad_(), labels, chunk=6)
    assert loss.requires_grad
    assert not statistic.requires_grad


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tokens_give_empty_outputs(frozen):
    hidden, labels = data(torch.float32, n=0)
    hidden.requires_grad_()
    score = Score(torch.float32, trained=not frozen)
    loss, active, right = chunked(score, hidden, labels, chunk=4, parameters=score.trained)
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
        got = chunked(score, hidden.requires_grad_(), labels, chunk=4, parameters=score.trained)
    assert not got[0].requires_grad
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    assert max(score.rows) == 4


def test_a_batch_with_every_token_clipped_has_no_gradient():
    hidden, labels = data(torch.float32)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros(len(states)), targets == targets

    loss, _ = chunked(score, hidden.requires_grad_(), labels, chunk=4)
    loss.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_gradcheck():
    hidden, labels = data(torch.float64, n=5)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(states @ weight.t(), targets, reduction="none"),)

    def loss(states: Tensor) -> Tensor:
        return chunked(score, states, labels, chunk=2)[0] * torch.arange(1.0, 6.0)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(),))


def test_chunk_length_bounds_the_logits():
    assert chunk_length(151_936) * 151_936 <= 2**24 < (chunk_length(151_936) + 1) * 151_936
    assert chunk_length(2**30) == 1
