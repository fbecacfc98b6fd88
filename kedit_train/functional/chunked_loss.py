"""Score tokens a chunk at a time, so that full ``[tokens, vocabulary]`` logits never exist.

A token's loss depends on its own hidden state alone, so gradients can be taken while a chunk's logits are still there:
what is kept for the backward pass is one [N, d] gradient, and one sum for each trained tensor of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from kedit_train.functional.chunked_linear import GradientSums

Score = Callable[..., tuple[Tensor, ...]]


def chunk_length(vocab_size: int, numbers: int = 2**24) -> int:
    """Tokens a chunk such that its logits hold at most ``numbers`` numbers (64 MiB in fp32 by default)."""
    return max(1, numbers // max(1, vocab_size))


def chunked(
    score: Score, hidden: Tensor, *rest: Tensor, chunk: int, parameters: Sequence[Tensor] = (), defer: bool = False
) -> tuple[Tensor, ...]:
    """Apply ``score`` to slices of ``chunk`` tokens and join what it returns.

    Gradients are taken in the forward pass, as if each loss were to receive a gradient of one. With respect to
    ``hidden`` that serves any other; with respect to ``parameters``, whose gradient is one sum over all tokens, it
    serves any that is the same for all losses (their sum or mean). For the rest every chunk is computed again in the
    backward pass. A loss that is to be weighted by token is therefore best weighted inside ``score``.

    Args:
        score: ``(hidden [n, d], *rest [n, ...]) -> (loss [n], *statistics [n])``, a function of each token by itself;
            only the loss is differentiated.
        hidden: [N, d], what the output head reads.
        rest: further tensors with N rows (labels, reference hidden states), not differentiated.
        chunk: tokens at a time.
        parameters: the trained tensors that ``score`` closes over. Their gradients are summed in fp32 (fp64 in fp64).
        defer: take gradients in the backward pass, where the gradient that each loss receives is known. In half
            precision the gradient of the logits is rounded; so it is rounded at the scale at which the host has it.

    Returns:
        The outputs of ``score`` for all N tokens, the loss connected to ``hidden`` and ``parameters``.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        with torch.no_grad():
            return _join([score(*parts) for parts in _slices(chunk, hidden, *rest)])
    return _Chunked.apply(score, chunk, defer, len(rest), hidden, *rest, *trained)  # pyright: ignore[reportReturnType]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Score, chunk: int, defer: bool, n_rest: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        (hidden, *rest), parameters = tensors[: 1 + n_rest], tensors[1 + n_rest :]
        ctx.score, ctx.chunk, ctx.parameters, ctx.unused = score, chunk, parameters, [None] * n_rest
        ctx.wants_hidden = ctx.needs_input_grad[4]
        ctx.sums, again = None, defer or bool(parameters)
        if again:
            # A second computation draws what the first one drew (dropout between the factors of an adapter).
            ctx.random = torch.get_rng_state(), *get_device_states(hidden)
        if defer:
            gradient = None
            joined = _join([score(*parts) for parts in _slices(chunk, hidden, *rest)])
        else:
            sums = GradientSums(parameters)
            joined, gradient = _differentiate(score, chunk, hidden, rest, sums, wants_hidden=ctx.wants_hidden)
            ctx.sums = sums if parameters else None
        ctx.save_for_backward(gradient, *((hidden, *rest) if again else ()))
        ctx.mark_non_differentiable(*joined[1:])
        ctx.set_materialize_grads(False)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grad_outputs[0]
        gradient, *inputs = ctx.saved_tensors
        sums, ctx.sums = ctx.sums, None
        if upstream is None:
            return (*[None] * 5, *ctx.unused, *[None] * len(ctx.parameters))
        # The sums are handed over, so a second backward pass through a retained graph has to take them again.
        if inputs and (sums is None or not _uniform(upstream)):
            hidden, *rest = inputs
            sums = GradientSums(ctx.parameters)
            cpu, devices, states = ctx.random
            with torch.random.fork_rng(devices, device_type=hidden.device.type if devices else "cuda"):
                torch.set_rng_state(cpu)
                set_device_states(devices, states, device_type=hidden.device.type)
                _, gradient = _differentiate(
                    ctx.score, ctx.chunk, hidden, rest, sums, upstream, wants_hidden=ctx.wants_hidden
                )
        else:
            if gradient is not None:
                # Not in half precision, where rounding the factor would scale every gradient.
                gradient = (gradient * upstream.unsqueeze(-1)).to(gradient.dtype)
            if sums is not None and len(upstream):
                sums.scale(upstream[0])
        taken = sums.take() if sums is not None else []
        return (None, None, None, None, gradient, *ctx.unused, *taken)


def _differentiate(
    score: Score,
    chunk: int,
    hidden: Tensor,
    rest: Sequence[Tensor],
    sums: GradientSums,
    upstream: Tensor | None = None,
    *,
    wants_hidden: bool,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Score every chunk; return what is returned for all tokens and the gradient [N, d], and fill ``sums``."""
    gradient = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
    outputs = []
    for start, parts in zip(range(0, max(1, len(hidden)), chunk), _slices(chunk, hidden, *rest), strict=True):
        rows = slice(start, start + chunk)
        factor = None if upstream is None else upstream[rows]
        # In a function of its own, so that nothing of one chunk's graph is alive while the next one is built.
        found, part_gradient = _one(score, parts, sums, factor, wants_hidden=wants_hidden)
        outputs.append(found)
        if gradient is not None and part_gradient is not None:
            gradient[rows] = part_gradient
    return _join(outputs), gradient


def _one(
    score: Score, parts: list[Tensor], sums: GradientSums, factor: Tensor | None, *, wants_hidden: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    part, *others = parts
    part = part.detach().requires_grad_(wants_hidden)
    with torch.enable_grad(), sums.collecting():
        loss, *statistics = score(part, *others)
        found = (loss.detach(), *(s.detach() for s in statistics))
        # A chunk whose tokens are all clipped may be a constant without any graph.
        if not loss.requires_grad:
            return found, None
        total = loss.sum() if factor is None else (loss * factor).sum()
        wrt = [part, *sums.tensors] if wants_hidden else sums.tensors
        gradients = list(torch.autograd.grad(total, wrt, allow_unused=True))
    part_gradient = gradients.pop(0) if wants_hidden else None
    sums.add(gradients)
    return found, part_gradient


def _uniform(upstream: Tensor) -> bool:
    """Whether all losses receive the same gradient, up to rounding; that of a sum is known without a look at it."""
    if len(upstream) < 2 or upstream.stride(0) == 0:
        return True
    first = upstream[0]
    return bool(((upstream - first).abs() <= 4 * torch.finfo(upstream.dtype).eps * first.abs()).all())


def _slices(chunk: int, *tensors: Tensor) -> list[list[Tensor]]:
    # At least one slice, empty if need be: a batch without supervised tokens still has outputs of the right kind.
    return [[t[i : i + chunk] for t in tensors] for i in range(0, max(1, len(tensors[0])), chunk)]


def _join(outputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
