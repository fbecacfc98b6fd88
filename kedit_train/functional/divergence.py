"""Divergences between two next-token distributions, per token, in nats."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kedit_train.functional.closed_form_losses import rowwise
from kedit_train.functional.precision import wide

Direction = Literal["forward", "reverse", "jsd"]


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return KL(p || q) of each token.

    Args:
        p_logits: [N, V], any float dtype. A token with a logit of minus infinity adds 0 to the divergence.
        q_logits: [N, V], any float dtype.

    Returns:
        [N] in nats, computed in fp32 (in fp64 for fp64 logits).
    """
    p_log, q_log = log_softmax(p_logits), log_softmax(q_logits)
    p = p_log.exp()
    # The difference is masked before the product, because two logits of minus infinity would give NaN in the gradient.
    return (p * (p_log - q_log).masked_fill(p == 0, 0.0)).sum(-1)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each token.

    It is the mean of KL(p || m) and KL(q || m), where m = (p + q) / 2.

    Args:
        p_logits: [N, V], any float dtype.
        q_logits: [N, V], any float dtype.

    Returns:
        [N] in nats, at most ln 2, computed in fp32 (in fp64 for fp64 logits).
    """
    p_log, q_log = log_softmax(p_logits), log_softmax(q_logits)
    # The values are clamped, because two logits of minus infinity would give NaN. The probability stays zero.
    p_log, q_log = (x.clamp(min=torch.finfo(x.dtype).min / 2) for x in (p_log, q_log))
    mixture = torch.logaddexp(p_log, q_log) - math.log(2.0)
    return 0.5 * (p_log.exp() * (p_log - mixture) + q_log.exp() * (q_log - mixture)).sum(-1)


def token_divergence(reference_logits: Tensor, logits: Tensor, *, direction: Direction = "forward") -> Tensor:
    """Return the divergence of the edited model from the reference model, per token.

    The values equal those of :func:`kl_divergence` and :func:`jensen_shannon`. If ``reference_logits`` needs no
    gradient, the divergence is computed in blocks of rows, with its gradient in closed form.

    Args:
        reference_logits: [N, V], any float dtype.
        logits: [N, V] of the edited model, any float dtype.
        direction: "forward" is KL(reference || model), "reverse" is KL(model || reference), "jsd" is the
            Jensen-Shannon divergence.

    Returns:
        [N] in nats, computed in fp32 (in fp64 for fp64 logits).

    Raises:
        ValueError: the direction is unknown.

    References:
        - Forward: "Fast Model Editing at Scale" (MEND), arXiv 2110.11309.
        - Reverse: "Locating and Editing Factual Associations in GPT" (ROME), arXiv 2202.05262.
    """
    if direction not in ("forward", "reverse", "jsd"):
        raise ValueError(f"direction must be 'forward', 'reverse' or 'jsd', got {direction!r}")
    if reference_logits.requires_grad and torch.is_grad_enabled():
        if direction == "jsd":
            return jensen_shannon(reference_logits, logits)
        pair = (reference_logits, logits) if direction == "forward" else (logits, reference_logits)
        return kl_divergence(*pair)
    value, gradient = {
        "forward": (_forward_value, _forward_gradient),
        "reverse": (_reverse_value, _reverse_gradient),
        "jsd": (_jsd_value, _jsd_gradient),
    }[direction]
    return rowwise(value, gradient, logits, reference_logits)[0]


# In the functions below, z contains the logits of the model in fp32 or fp64, and q the probabilities of the model.
# ``reference`` contains the stored logits of the reference model, in any dtype, and p the probabilities of this model.


def _forward_value(z: Tensor, reference: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (_kl(reference.to(z.dtype).log_softmax(-1), z.log_softmax(-1)),), ()


def _forward_gradient(out: Tensor, z: Tensor, reference: Tensor) -> None:
    torch.softmax(z, -1, out=out).sub_(reference.to(z.dtype).softmax(-1))


def _reverse_value(z: Tensor, reference: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    divergence = _kl(z.log_softmax(-1), reference.to(z.dtype).log_softmax(-1))
    return (divergence,), (divergence,)


def _reverse_gradient(out: Tensor, z: Tensor, reference: Tensor, divergence: Tensor) -> None:
    q_log = z.log_softmax(-1)
    torch.sub(q_log, reference.to(z.dtype).log_softmax(-1), out=out).nan_to_num_(nan=0.0, neginf=0.0, posinf=math.inf)
    out.sub_(divergence.unsqueeze(-1)).mul_(q_log.exp_())


def _jsd_value(z: Tensor, reference: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    q, p = z.softmax(-1), reference.to(z.dtype).softmax(-1)
    tilt = _tilt(q, p)
    q_part = torch.log1p(tilt).nan_to_num_(neginf=0.0).mul_(q).sum(-1)
    p_part = tilt.neg_().log1p_().nan_to_num_(neginf=0.0).mul_(p).sum(-1)
    return (0.5 * (p_part + q_part),), (q_part,)


def _jsd_gradient(out: Tensor, z: Tensor, reference: Tensor, q_part: Tensor) -> None:
    q = torch.softmax(z, -1, out=out)
    log_ratio = _tilt(q, reference.to(z.dtype).softmax(-1)).log1p_().nan_to_num_(neginf=0.0)
    q.mul_(log_ratio.sub_(q_part.unsqueeze(-1)).mul_(0.5))


def _kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities. ``p_log`` is overwritten."""
    p = p_log.exp()
    # Where p is zero, the difference may be minus infinity or NaN.
    return p_log.sub_(q_log).nan_to_num_(nan=0.0, neginf=0.0, posinf=math.inf).mul_(p).sum(-1)


def _tilt(q: Tensor, p: Tensor) -> Tensor:
    """Return ``tilt = (q - p) / (q + p)``. If m is (p + q) / 2, then q / m = 1 + tilt, and p / m = 1 - tilt."""
    return (q - p).div_(q + p).nan_to_num_(nan=0.0)


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log probabilities of logits [..., V], in fp32 (fp64 if the logits are in fp64)."""
    return wide(logits).log_softmax(-1)
