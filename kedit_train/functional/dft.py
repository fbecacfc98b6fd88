"""Cross-entropy reweighted by the model's own belief: what it finds unlikely pulls it less.

Source: "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification" (Dynamic
Fine-Tuning, arXiv 2508.05629).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.closed_form_losses import Value, rowwise
from kedit_train.functional.overtone import clipped


def dynamic_cross_entropy(logits: Tensor, labels: Tensor, *, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Score tokens by DFT: each token's cross-entropy times its own probability, which is held constant.

    The gradient with respect to the logits is ``p_y (p - one_hot(y))``. Read as a policy gradient, cross-entropy
    rewards a token by ``1 / p_y``, the more the less likely the model finds it; here every target is rewarded alike.

    Args:
        logits: [N, V] at the positions that predict ``labels``; any float dtype, computed in fp32 (fp64 stays fp64).
        labels: [N] token ids.
        epsilon: clip of the cross-entropy in nats, before it is weighted; 0 is the paper's loss.

    Returns:
        loss [N], active [N] bool (cross-entropy above ``epsilon``).
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
