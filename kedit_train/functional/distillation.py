"""Distillation from a teacher of which only the most probable tokens are stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional.clipping import clipped
from kedit_train.functional.precision import wide
from kedit_train.functional.top_k_divergence import bucket_divergence


def distillation(
    logits: Tensor, labels: Tensor, log_probs: Tensor, tokens: Tensor, taught: Tensor, *, epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each token: the divergence from a teacher, or the cross-entropy of the label.

    The divergence is KL(teacher || model) over k + 1 buckets: the k most probable tokens of the teacher, and all other
    tokens together. The entropy of the teacher is constant, so the gradient is that of cross-entropy with soft targets.

    Args:
        logits: [N, V] at the positions that predict ``labels``; any float dtype, computed in fp32 (fp64 stays fp64).
        labels: [N] token ids.
        log_probs: [N, k + 1], the teacher's log-probabilities from
            :func:`~kedit_train.functional.top_k_divergence.top_log_probs`. Rows without a teacher are ignored.
        tokens: [N, k] token ids from the same call.
        taught: [N] bool, True where the target is the teacher, and False where the target is the label.
        epsilon: clip in nats. A token with a loss of at most ``epsilon`` has no gradient.

    Returns:
        The loss [N] in nats, and a bool tensor [N] that is True where the loss is above ``epsilon``.

    References:
        - "In-Context Editing: Learning Knowledge from Self-Induced Distributions", arXiv 2406.11194.
        - "Learning by Distilling Context", arXiv 2209.15189.
    """
    soft = bucket_divergence(log_probs, tokens, logits)
    hard = F.cross_entropy(wide(logits), labels, reduction="none")
    return clipped(torch.where(taught, soft, hard), epsilon)
