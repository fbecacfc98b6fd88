"""The clipped divergence from a target distribution. A token with a small divergence has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.precision import wide


def clipped(divergence: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Clip divergences from below. Clipped divergences have no gradient.

    Args:
        divergence: [N], in nats.
        epsilon: the clip in nats, at least 0. Smaller divergences are replaced by this value.

    Returns:
        ``max(divergence, epsilon)`` [N], and a bool tensor [N] that is True where the divergence is above ``epsilon``
        or NaN. So a token with a NaN divergence is not reported as learned.
    """
    active = ~(divergence <= epsilon)
    # clamp(min=epsilon) has a gradient of one where the values are equal, and a clipped token must have no gradient.
    return torch.where(active, divergence, epsilon), active


def smoothed_loss(logits: Tensor, target: Tensor, *, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the clipped forward divergence ``max(KL(target || model), epsilon)`` of each token.

    This function is the reference implementation. The objectives of this package compute the same loss, but do not
    build the tensor ``target``.

    Args:
        logits: [N, V], any float dtype. The loss is computed in fp32 (in fp64 for fp64 logits).
        target: [N, V] probabilities, a constant.
        epsilon: clip in nats.

    Returns:
        The loss [N] in nats, and a bool tensor [N] that is True where the divergence is above ``epsilon``.

    References:
        "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", arXiv 2502.00602, equation 3.
    """
    log_probs = wide(logits).log_softmax(-1)
    negative_entropy = torch.special.xlogy(target, target).sum(-1)
    # The product of a target of zero and a logit of minus infinity must be zero, not NaN.
    cross_entropy = -(target * log_probs.masked_fill(target == 0, 0.0)).sum(-1)
    return clipped(negative_entropy + cross_entropy, epsilon)
