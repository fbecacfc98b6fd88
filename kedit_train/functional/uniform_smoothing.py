"""Uniform label smoothing: the target is a mixture of the label and the uniform distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kedit_train.functional.clipping import clipped
from kedit_train.functional.closed_form_losses import rowwise
from kedit_train.functional.precision import wide
from kedit_train.functional.softmax_rows import log_normalizer, shifted_logits, subtract_label, write_padded_gradient


def uniform_target(
    logits: Tensor, labels: Tensor, *, label_weight: float = 0.9, vocab_size: int | None = None
) -> Tensor:
    """Mix the one-hot label with the uniform distribution over the true vocabulary.

    Args:
        logits: [N, V]; only the shape, dtype and device are used.
        labels: [N] token ids.
        label_weight: weight of the one-hot label in the mixture, in [0, 1].
        vocab_size: size of the true vocabulary, if the output head has more rows (vocabulary padding). Padding gets
            probability 0.

    Returns:
        The target [N, V], in fp32 (fp64 for fp64 logits).

    References:
        "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, section 7.
    """
    with torch.no_grad():
        size = vocab_size or logits.shape[-1]
        target = torch.zeros_like(wide(logits))
        target[:, :size] = (1.0 - label_weight) / size
        place = labels.unsqueeze(-1)
        return target.scatter_add_(-1, place, torch.full_like(place, 1, dtype=target.dtype).mul_(label_weight))


def uniform(
    logits: Tensor, labels: Tensor, *, label_weight: float = 0.9, epsilon: float = 0.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each token with uniform label smoothing, with the gradient in closed form.

    The result equals :func:`~kedit_train.functional.clipping.smoothed_loss` with the target of :func:`uniform_target`,
    but the target is not built.

    Args:
        logits: [N, V] at the positions that predict ``labels``, any float dtype. The loss is computed in fp32 (in fp64
            for fp64 logits).
        labels: [N] token ids.
        label_weight: weight of the one-hot label in the target, in [0, 1].
        epsilon: threshold in nats. A token whose divergence is at most ``epsilon`` has no gradient.
        vocab_size: size of the true vocabulary, if the output head has more rows (vocabulary padding).

    Returns:
        The loss [N] in nats, and a bool tensor [N] that is True where the divergence is above ``epsilon``.
    """
    size = logits.shape[-1] if vocab_size is None else vocab_size
    share = (1.0 - label_weight) / size
    share_log_share = share * math.log(share) if share > 0.0 else 0.0

    def value(z: Tensor, y: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        top, shifted, label = shifted_logits(z, y, size)
        # Without smoothing, a logit of minus infinity must add nothing, but 0 times infinity would be NaN.
        flat = share * shifted.sum(-1) if share > 0.0 else 0.0
        log_z = log_normalizer(shifted.exp_(), z, top)
        inside = (y < size).to(z.dtype)
        mass = label_weight + share * inside
        negative_entropy = torch.xlogy(mass, mass) + (size - inside) * share_log_share
        divergence = negative_entropy + log_z - flat - label_weight * label
        loss, active = clipped(divergence, epsilon)
        return (loss, active), (top, log_z, active)

    def gradient(out: Tensor, z: Tensor, y: Tensor, top: Tensor, log_z: Tensor, active: Tensor) -> None:
        shifted = write_padded_gradient(out, z, top, log_z, size)
        shifted.sub_(log_z.unsqueeze(-1)).exp_().sub_(share)
        subtract_label(out, y, torch.full_like(log_z, label_weight), active)

    loss, active = rowwise(value, gradient, logits, labels)
    return loss, active
