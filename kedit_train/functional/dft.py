"""Dynamic fine-tuning (DFT): the cross-entropy of each token is multiplied by the probability of the token."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.clipping import clipped
from kedit_train.functional.closed_form_losses import Value, rowwise


def dynamic_cross_entropy(logits: Tensor, labels: Tensor, *, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute the DFT loss of each token, with the gradient in closed form.

    The loss is the cross-entropy times the probability ``p_y`` of the label. ``p_y`` is treated as a constant, so the
    gradient of the logits is ``p_y (p - one_hot(y))``. The factor ``p_y`` has the following reason. The gradient of
    plain cross-entropy is a policy gradient with the reward ``1 / p_y``, so tokens with a low probability dominate it.
    With the factor, every token has the same reward.

    Args:
        logits: [N, V] at the positions that predict ``labels``, any float dtype. The loss is computed in fp32 (in fp64
            for fp64 logits).
        labels: [N] token ids.
        epsilon: clip in nats, applied to the cross-entropy before it is multiplied by ``p_y``. The paper does not clip
            (``epsilon=0``).

    Returns:
        The loss [N] in nats, and a bool tensor [N] that is True where the cross-entropy is above ``epsilon``.

    References:
        "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
        arXiv 2508.05629.
    """
    loss, active = rowwise(_value(epsilon), _gradient, logits, labels)
    return loss, active


def _value(epsilon: float) -> Value:
    def value(z: Tensor, y: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        top = z.amax(-1, keepdim=True)
        log_z = (z - top).exp_().sum(-1).log()
        cross_entropy = log_z - (z.gather(-1, y.unsqueeze(-1)) - top).squeeze(-1)
        probability = (-cross_entropy).exp()
        loss, active = clipped(cross_entropy, epsilon)
        return (probability * loss, active), (top, log_z, probability * active)

    return value


def _gradient(out: Tensor, z: Tensor, y: Tensor, top: Tensor, log_z: Tensor, weight: Tensor) -> None:
    torch.sub(z, top, out=out).sub_(log_z.unsqueeze(-1)).exp_()
    out.scatter_add_(-1, y.unsqueeze(-1), out.new_full((len(out), 1), -1.0)).mul_(weight.unsqueeze(-1))
