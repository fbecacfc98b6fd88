"""Common parts of softmax losses with closed-form gradients, for rows of logits in fp32 or fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_logits(z: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shift each row of logits, so that the greatest logit of the true vocabulary becomes 0.

    Args:
        z: [n, V] logits.
        labels: [n] token ids.
        size: number of entries of the true vocabulary. The output head may have more rows (vocabulary padding).

    Returns:
        The greatest logit before the shift [n, 1], the shifted logits of the true vocabulary [n, size], and the shifted
        logit of the label [n].
    """
    top = z[:, :size].amax(-1, keepdim=True)
    return top, z[:, :size] - top, (z.gather(-1, labels.unsqueeze(-1)) - top).squeeze(-1)


def log_normalizer(exponentials: Tensor, z: Tensor, top: Tensor) -> Tensor:
    """Return the log of the sum of ``exp(z - top)`` for each row.

    The sum is over all V logits of a row, including the vocabulary padding.

    Args:
        exponentials: [n, size], the exponentials of the shifted logits of the true vocabulary.
        z: [n, V] logits.
        top: [n, 1], the greatest logit of the true vocabulary.

    Returns:
        [n], equal to ``z.logsumexp(-1) - top[:, 0]``.
    """
    log_z = exponentials.sum(-1).log()
    padded = z[:, exponentials.shape[-1] :]
    return torch.logaddexp(log_z, (padded - top).logsumexp(-1)) if padded.shape[-1] else log_z


def write_padded_gradient(out: Tensor, z: Tensor, top: Tensor, log_z: Tensor, size: int) -> Tensor:
    """Write the gradient of the vocabulary padding into ``out``, and shifted logits into the other columns.

    The first ``size`` columns get ``z - top``, from which the caller computes the gradient. All other columns belong to
    vocabulary padding. The gradient of a padding logit is the probability of its token.

    Args:
        out: [n, V], overwritten.
        z: [n, V] logits.
        top: [n, 1], the greatest logit of the true vocabulary.
        log_z: [n], from :func:`log_normalizer`.
        size: number of entries of the true vocabulary.

    Returns:
        The part of ``out`` that contains the shifted logits, [n, size].
    """
    if size < z.shape[-1]:
        torch.sub(z[:, size:], top + log_z.unsqueeze(-1), out=out[:, size:]).exp_()
    return torch.sub(z[:, :size], top, out=out[:, :size])


def subtract_label(out: Tensor, labels: Tensor, mass: Tensor, active: Tensor) -> None:
    """Subtract ``mass`` from the label's entry in each row of ``out``, then set the inactive rows to 0.

    Args:
        out: [n, V], changed in place.
        labels: [n] token ids.
        mass: [n], the part of the label's target probability that the caller has not subtracted yet.
        active: [n] bool, False for a token that has no gradient.
    """
    out.scatter_add_(-1, labels.unsqueeze(-1), -mass.unsqueeze(-1))
    out.mul_(active.unsqueeze(-1))
