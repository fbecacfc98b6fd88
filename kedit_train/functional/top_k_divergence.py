"""Divergence from a distribution of which only the most probable tokens are known, and the mass of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.divergence import Direction, token_divergence


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum up distributions as their ``k`` most probable tokens and the rest: what is kept of another, larger model.

    Args:
        logits: [N, V] with ``1 <= k <= V``, computed in fp32 (fp64 stays fp64).

    Returns:
        log-probabilities [N, k + 1], the last of all other tokens together (minus infinity where ``k == V``), and the
        tokens [N, k], most probable first.
    """
    log_probs = _log_softmax(logits)
    top, tokens = log_probs.topk(k, dim=-1)
    return torch.cat([top, _rest(log_probs, tokens)], dim=-1), tokens


def bucket_divergence(reference: Tensor, tokens: Tensor, logits: Tensor, *, direction: Direction = "forward") -> Tensor:
    """Divergence between two distributions of which only k + 1 buckets are told apart, [N].

    All three directions are defined on buckets, and each is at most its value on the whole vocabulary (data processing
    inequality): how the rest is spread over its tokens is left to the model.

    Args:
        reference: log-probabilities [N, k + 1], and tokens: [N, k], both from :func:`top_log_probs`.
        logits: [N, V] of the edited model.
    """
    log_probs = _log_softmax(logits)
    own = log_probs.gather(-1, tokens)
    if tokens.shape[-1] == logits.shape[-1]:
        # Nothing is left; minus infinity on both sides would leave NaN in the gradient.
        return token_divergence(reference[:, :-1], own, direction=direction)
    return token_divergence(reference, torch.cat([own, _rest(log_probs, tokens)], dim=-1), direction=direction)


def _rest(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log of the mass on all other tokens [N, 1], summed itself: one minus the others would lose what is small."""
    return log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
