"""Score tokens a chunk at a time, so that full ``[tokens, vocabulary]`` logits never exist.

A token's loss depends on its own hidden state alone. With a frozen head its gradient with respect to that state can
therefore be taken while its logits are still there: what is kept for the backward pass is [N, d], not [N, V].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Score = Callable[..., tuple[Tensor, ...]]


def chunk_length(vocab_size: int, numbers: int = 2**24) -> int:
    """Tokens a chunk such that its logits hold at most ``numbers`` numbers (64 MiB in fp32 by default)."""
    return max(1, numbers // max(1, vocab_size))


def chunked(
    score: Score, hidden: Tensor, *rest: Tensor, chunk: int, frozen_head: bool, weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Apply ``score`` to slices of ``chunk`` tokens and join what it returns.

    Args:
        score: ``(hidden [n, d], *rest [n, ...]) -> (loss [n], *statistics [n])``, a function of each token by itself;
            only the loss is differentiated.
        hidden: [N, d], what the output head reads.
        rest: further tensors with N rows (labels, reference hidden states), not differentiated.
        chunk: tokens at a time.
        frozen_head: nothing that ``score`` closes over is trained. Otherwise each chunk is computed again in the
            backward pass, so that its gradient reaches the head as well.
        weights: [N] positive; the gradient that each loss is expected to receive. In half precision the gradient of the
            logits is rounded, and at this scale it is rounded as the host would have rounded it. Any other gradient
            is right as well.

    Returns:
        The outputs of ``score`` for all N tokens, the loss connected to ``hidden``.
    """
    if not torch.is_grad_enabled():
        return _join([score(*parts) for parts in _slices(chunk, hidden, *rest)])
    if frozen_head:
        weights = torch.ones(len(hidden), device=hidden.device) if weights is None else weights
        return _GradientInForward.apply(hidden, score, chunk, weights, *rest)  # pyright: ignore[reportReturnType]
    parts = [checkpoint(score, *part, use_reentrant=False) for part in _slices(chunk, hidden, *rest)]
    return _join([(loss, *(s.detach() for s in statistics)) for loss, *statistics in parts])


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, score: Score, chunk: int, weights: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, gradients = [], []
        for part, factor, *others in _slices(chunk, hidden, weights, *rest):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                loss, *statistics = score(part, *others)
                # Rows are independent, so the gradient of the sum holds every token's own gradient. A chunk whose
                # tokens are all clipped is a constant and has no graph at all.
                total = (loss * factor).sum()
                gradient = torch.autograd.grad(total, part)[0] if loss.requires_grad else torch.zeros_like(part)
            outputs.append((loss.detach(), *(s.detach() for s in statistics)))
            gradients.append(gradient)
        joined = _join(outputs)
        ctx.save_for_backward(torch.cat(gradients), weights)
        ctx.mark_non_differentiable(*joined[1:])
        ctx.unused = 3 + len(rest)
        return joined

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weights = ctx.saved_tensors
        factor = (grad_outputs[0] / weights).to(gradient.dtype)
        return (factor.unsqueeze(-1) * gradient, *[None] * ctx.unused)


def _slices(chunk: int, *tensors: Tensor) -> list[list[Tensor]]:
    # At least one slice, empty if need be: a batch without supervised tokens still has outputs of the right kind.
    return [[t[i : i + chunk] for t in tensors] for i in range(0, max(1, len(tensors[0])), chunk)]


def _join(outputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
