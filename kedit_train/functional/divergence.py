"""How far one next-token distribution is from another, per token, in nats."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "reverse", "jsd"]


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) for each token.

    Args:
        p_logits, q_logits: [N, V], any float dtype, computed in fp32 (fp64 stays fp64). Minus infinity in ``p``
            contributes nothing.

    Returns:
        [N], in nats.
    """
    p_log, q_log = _log_softmax(p_logits), _log_softmax(q_logits)
    p = p_log.exp()
    # Masked before the product: minus infinity on both sides would leave NaN in the gradient.
    return (p * (p_log - q_log).masked_fill(p == 0, 0.0)).sum(-1)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence (half of each side's KL to the even mixture), [N], at most ln 2."""
    p_log, q_log = _log_softmax(p_logits), _log_softmax(q_logits)
    # Finite, so that minus infinity on both sides leaves no NaN, in the gradient neither; the mass stays zero.
    p_log, q_log = (x.clamp(min=torch.finfo(x.dtype).min / 2) for x in (p_log, q_log))
    mixture = torch.logaddexp(p_log, q_log) - math.log(2.0)
    return 0.5 * (p_log.exp() * (p_log - mixture) + q_log.exp() * (q_log - mixture)).sum(-1)


def token_divergence(reference_logits: Tensor, logits: Tensor, *, direction: Direction = "forward") -> Tensor:
    """Divergence of the edited model from the reference, [N].

    Args:
        direction: "forward" is KL(reference || model), the term of MEND (arXiv 2110.11309); "reverse" is
            KL(model || reference), the term in ROME's value optimisation (arXiv 2202.05262); "jsd" lies between.
    """
    if direction == "forward":
        return kl_divergence(reference_logits, logits)
    if direction == "reverse":
        return kl_divergence(logits, reference_logits)
    if direction == "jsd":
        return jensen_shannon(reference_logits, logits)
    raise ValueError(f"direction={direction!r} is none of 'forward', 'reverse', 'jsd'")


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
