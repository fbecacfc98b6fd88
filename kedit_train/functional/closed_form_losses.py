"""Compute per-token losses with a closed-form gradient, in few passes over the logits.

The forward pass keeps a few values per token, and the backward pass writes the gradient of the logits once. No other
tensor as large as the logits is kept. On a CPU, both passes work on blocks of rows that fit into the CPU cache. Without
blocks, each temporary tensor would be as large as the logits, and the allocations would take longer than the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kedit_train.functional.precision import wide

# Number of values in one block, which take 4 MiB in fp32.
_BLOCK = 2**20

# The arguments are logits [n, V] in fp32 or fp64, and rows [n, ...]. The result is a pair: the outputs [n] (the loss,
# then statistics), and the tensors [n, ...] that are kept for the gradient.
Value = Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
# The arguments are out [n, V], logits [n, V], rows [n, ...] and the kept tensors [n, ...]. The gradient is written into
# out.
Gradient = Callable[..., None]


def rowwise(value: Value, gradient: Gradient, logits: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Compute the loss of each row. The caller passes one function for the loss and one for its gradient.

    The rows are processed in blocks.

    Args:
        value: function ``(logits, *rows) -> (outputs, kept)``. ``outputs`` is a tuple: its first entry is the loss, and
            its other entries have no gradient. The values of a row must not depend on other rows. The tensors in
            ``kept`` are passed to ``gradient``.
        gradient: function ``(out, logits, *rows, *kept)`` that writes the gradient of the loss with respect to the
            logits into ``out``. The backward pass then multiplies ``out`` by the upstream gradient.
        logits: [N, V], any float dtype. Both functions receive the logits in fp32 (fp64 stays fp64).
        rows: further tensors with N entries (labels, reference logits). They get no gradient.

    Returns:
        The entries of ``outputs`` for all rows, [N] each.
    """
    return _Rowwise.apply(value, gradient, logits, *rows)  # pyright: ignore[reportReturnType]


def blocks(logits: Tensor, *rows: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors with N entries into blocks. If N is 0, return one empty block.

    On a CPU, a block is small enough for the cache. On every other device, one block contains all entries.
    """
    size = max(1, _BLOCK // max(1, logits.shape[-1])) if logits.device.type == "cpu" else max(1, len(logits))
    starts = range(0, max(1, len(logits)), size)
    return [tuple(t[i : i + size] for t in (logits, *rows)) for i in starts]


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each token's distribution in nats, without gradient.

    Args:
        logits: [N, V], any float dtype. The entropy is computed in fp32 (in fp64 for fp64 logits).

    Returns:
        [N].
    """
    with torch.no_grad():
        entropies = []
        for (part,) in blocks(logits):
            log_probs = wide(part).log_softmax(-1)
            # The product of a probability of zero and a logarithm of minus infinity must be zero.
            entropies.append(-log_probs.exp().mul_(log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)).sum(-1))
        return torch.cat(entropies)


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Value, gradient: Gradient, logits: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        results = [value(wide(part), *others) for part, *others in blocks(logits, *rows)]
        outputs, kept = (
            tuple(torch.cat(column) for column in zip(*side, strict=True)) for side in zip(*results, strict=True)
        )
        ctx.gradient, ctx.n_rows = gradient, len(rows)
        ctx.save_for_backward(logits, *rows, *kept)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, *others = ctx.saved_tensors
        out = torch.empty_like(logits)
        for to, part, upstream, *rest in blocks(out, logits, grad_outputs[0], *others):
            # In half precision the gradient is rounded once, after it is complete.
            fresh = to if to.dtype == wide(part).dtype else torch.empty_like(wide(part))
            ctx.gradient(fresh, wide(part), *rest)
            fresh.mul_(upstream.unsqueeze(-1))
            if fresh is not to:
                to.copy_(fresh)
        return (None, None, out, *[None] * ctx.n_rows)
