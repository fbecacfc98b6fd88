"""Divergence from a reference distribution of which only the k most probable tokens are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.divergence import Direction, log_softmax, token_divergence


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Reduce distributions to their ``k`` most probable tokens and the total probability of all other tokens.

    Args:
        logits: [N, V], any float dtype.
        k: number of tokens, 1 to V.

    Returns:
        Log-probabilities [N, k + 1] and token ids [N, k], most probable first. The last column of the log-probabilities
        belongs to all other tokens together (minus infinity if ``k == V``). The log-probabilities are computed in fp32
        (in fp64 for fp64 logits).
    """
    log_probs = log_softmax(logits)
    top, tokens = log_probs.topk(k, dim=-1)
    return torch.cat([top, _rest(log_probs, tokens)], dim=-1), tokens


def bucket_divergence(reference: Tensor, tokens: Tensor, logits: Tensor, *, direction: Direction = "forward") -> Tensor:
    """Return the divergence between two distributions over k + 1 buckets: k tokens, and all others together.

    The tokens in the last bucket are not compared one by one. Therefore, the result is never larger than the divergence
    over the whole vocabulary in the same direction (data processing inequality).

    Args:
        reference: [N, k + 1] log-probabilities from :func:`top_log_probs`.
        tokens: [N, k] token ids from the same call.
        logits: [N, V] of the edited model.
        direction: "forward", "reverse" or "jsd"; see :func:`~kedit_train.functional.divergence.token_divergence`.

    Returns:
        [N] in nats.
    """
    log_probs = log_softmax(logits)
    own = log_probs.gather(-1, tokens)
    if tokens.shape[-1] == logits.shape[-1]:
        # There are no other tokens, and minus infinity on both sides would give NaN in the gradient.
        return token_divergence(reference[:, :-1], own, direction=direction)
    return token_divergence(reference, torch.cat([own, _rest(log_probs, tokens)], dim=-1), direction=direction)


def _rest(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the log of the total probability of all tokens except ``tokens``, [N, 1]."""
    # The difference of 1 and the probability of ``tokens`` would lose small values to rounding.
    return log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
