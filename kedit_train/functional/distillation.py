"""Distillation from a teacher. Only the teacher's k most probable tokens are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kedit_train.functional.clipping import clipped
from kedit_train.functional.closed_form_losses import rowwise
from kedit_train.functional.softmax_rows import subtract_label


def distillation(
    logits: Tensor, labels: Tensor, log_probs: Tensor, tokens: Tensor, taught: Tensor, *, epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each token: the divergence from a teacher, or the cross-entropy of the label.

    The divergence is KL(teacher || model) over k + 1 buckets: the k most probable tokens of the teacher, and all other
    tokens together. Its gradient equals the gradient of cross-entropy with the teacher's probabilities as soft targets,
    because the two losses differ only by the entropy of the teacher, which is constant.

    Args:
        logits: [N, V] at the positions that predict ``labels``, any float dtype. The loss is computed in fp32 (in fp64
            for fp64 logits).
        labels: [N] token ids.
        log_probs: [N, k + 1], the teacher's log-probabilities from
            :func:`~kedit_train.functional.top_k_divergence.top_log_probs`. Rows where ``taught`` is False are ignored.
        tokens: [N, k] token ids from the same call.
        taught: [N] bool, True where the target is the teacher, and False where the target is the label.
        epsilon: threshold in nats. A token whose loss is at most ``epsilon`` has no gradient.

    Returns:
        The loss [N] in nats, and a bool tensor [N] that is True where the loss is above ``epsilon``.

    References:
        - "In-Context Editing: Learning Knowledge from Self-Induced Distributions", arXiv 2406.11194.
        - "Learning by Distilling Context", arXiv 2209.15189.
    """

    def value(z: Tensor, y: Tensor, reference: Tensor, top: Tensor, is_taught: Tensor) -> tuple[Any, Any]:
        log_z = z.logsumexp(-1, keepdim=True)
        # The probabilities of all other tokens are summed directly. The difference of 1 and the probability of the top
        # tokens would lose small values to rounding.
        rest = z.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True) - log_z
        p_log, q_log = reference.to(z.dtype), torch.cat([z.gather(-1, top) - log_z, rest], dim=-1)
        # Where the teacher's probability is zero, the difference may be NaN.
        soft = (p_log.exp() * (p_log - q_log).masked_fill(p_log == -torch.inf, 0.0)).sum(-1)
        hard = (log_z - z.gather(-1, y.unsqueeze(-1))).squeeze(-1)
        # The gradient of the logit of any other token is the probability of the token times ``factor``.
        ratio = (p_log[:, -1:] - rest).nan_to_num(nan=-torch.inf).clamp(max=80.0).exp()
        factor = torch.where(is_taught.unsqueeze(-1), 1.0 - ratio, 1.0)
        loss, active = clipped(torch.where(is_taught, soft, hard), epsilon)
        return (loss, active), (log_z, factor, active)

    def gradient(
        out: Tensor, z: Tensor, y: Tensor, reference: Tensor, top: Tensor, is_taught: Tensor,
        log_z: Tensor, factor: Tensor, active: Tensor,
    ) -> None:  # fmt: skip
        torch.sub(z, log_z, out=out).exp_()
        of_top = out.gather(-1, top)
        out.mul_(factor)
        target = reference[:, :-1].to(z.dtype).exp()
        out.scatter_(-1, top, torch.where(is_taught.unsqueeze(-1), of_top - target, of_top))
        subtract_label(out, y, (~is_taught).to(z.dtype), active)

    loss, active = rowwise(value, gradient, logits, labels, log_probs, tokens, taught)
    return loss, active
