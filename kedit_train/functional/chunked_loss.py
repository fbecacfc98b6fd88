"""Compute losses in chunks of tokens, so that the full logits ``[tokens, vocabulary]`` never exist.

The loss of a token depends only on its own hidden state. Therefore, the gradients of a chunk can be computed before its
logits are freed. The forward pass does not keep the logits. It keeps the gradient [N, d] of the hidden states, and one
gradient for each trained tensor of the head, summed over all chunks.
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
    """Return how many tokens fit into a chunk of at most ``numbers`` logits. The result is at least 1.

    Args:
        vocab_size: number of logits per token.
        numbers: maximum number of logits in a chunk. The default is 2**24 logits, which take 64 MiB in fp32.
    """
    return max(1, numbers // max(1, vocab_size))


def chunked(
    score: Score, hidden: Tensor, *rest: Tensor, chunk: int, parameters: Sequence[Tensor] = (), defer: bool = False
) -> tuple[Tensor, ...]:
    """Apply ``score`` to chunks of tokens and join the outputs.

    By default, the forward pass also computes the gradients, and assumes that the upstream gradient of every loss is
    one. The backward pass then multiplies these gradients by the actual upstream gradients.

    The gradients of ``parameters`` are stored only as sums over all tokens. The backward pass can scale these sums if
    all upstream gradients are equal, as after a sum or a mean of the losses. If the upstream gradients differ, the
    backward pass computes every chunk a second time. To avoid this, apply token weights inside ``score``.

    Args:
        score: ``(hidden [n, d], *rest [n, ...]) -> (loss [n], *statistics [n])``. The values of a token must not depend
            on other tokens. Only the loss is differentiated.
        hidden: [N, d], the input of the output head.
        rest: further tensors with N entries (labels, reference hidden states). They get no gradient.
        chunk: tokens in one chunk.
        parameters: the trained tensors that ``score`` uses. Gradients of fp64 tensors are summed in fp64, gradients of
            all other tensors in fp32.
        defer: if True, the gradients are computed only in the backward pass. There, the gradient of the logits is
            multiplied by the upstream gradient before it is rounded to half precision. Every chunk is computed twice.

    Returns:
        The outputs of ``score`` for all N tokens. The loss is differentiable with respect to ``hidden`` and
        ``parameters``.
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
            # The second computation must draw the same random numbers (dropout between the factors of an adapter).
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
        # The sums are kept for one backward pass. A second backward pass through a retained graph computes them again.
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
                # The factor is not rounded to half precision before the product, because its rounding error would
                # change all gradients by the same factor.
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
    """Score every chunk, and add the gradients of the trained tensors to ``sums``.

    Returns:
        The joined outputs of ``score``, and the gradient [N, d] of ``hidden`` (None if ``wants_hidden`` is False).
    """
    gradient = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
    outputs = []
    for start, parts in zip(range(0, max(1, len(hidden)), chunk), _slices(chunk, hidden, *rest), strict=True):
        rows = slice(start, start + chunk)
        factor = None if upstream is None else upstream[rows]
        # A separate function is used, so that the graph of one chunk is freed before the graph of the next chunk is
        # built.
        result, part_gradient = _differentiate_chunk(score, parts, sums, factor, wants_hidden=wants_hidden)
        outputs.append(result)
        if gradient is not None and part_gradient is not None:
            gradient[rows] = part_gradient
    return _join(outputs), gradient


def _differentiate_chunk(
    score: Score, parts: list[Tensor], sums: GradientSums, factor: Tensor | None, *, wants_hidden: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    part, *others = parts
    part = part.detach().requires_grad_(wants_hidden)
    with torch.enable_grad(), sums.collecting():
        loss, *statistics = score(part, *others)
        result = (loss.detach(), *(s.detach() for s in statistics))
        # If all tokens of a chunk are clipped, the loss can be a constant without a graph.
        if not loss.requires_grad:
            return result, None
        total = loss.sum() if factor is None else (loss * factor).sum()
        wrt = [part, *sums.tensors] if wants_hidden else sums.tensors
        gradients = list(torch.autograd.grad(total, wrt, allow_unused=True))
    part_gradient = gradients.pop(0) if wants_hidden else None
    sums.add(gradients)
    return result, part_gradient


def _uniform(upstream: Tensor) -> bool:
    """Return whether all losses receive the same gradient, up to rounding.

    An expanded tensor, such as the gradient of a sum, is recognized without reading its values from the device.
    """
    if len(upstream) < 2 or upstream.stride(0) == 0:
        return True
    first = upstream[0]
    return bool(((upstream - first).abs() <= 4 * torch.finfo(upstream.dtype).eps * first.abs()).all())


def _slices(chunk: int, *tensors: Tensor) -> list[list[Tensor]]:
    # There is at least one slice, which may be empty. So the outputs of a batch without supervised tokens get the right
    # dtype.
    return [[t[i : i + chunk] for t in tensors] for i in range(0, max(1, len(tensors[0])), chunk)]


def _join(outputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
