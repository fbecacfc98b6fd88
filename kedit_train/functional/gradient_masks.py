"""Turn scores into masks that select the weights with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top(scores: Tensor, density: float) -> Tensor:
    """Return a mask of the ``round(density * n)`` highest scores.

    Among equal scores, those with a lower index are selected first.

    Args:
        scores: any shape, n finite numbers.
        density: fraction of the scores to select, in [0, 1].

    Returns:
        A bool mask of the same shape.

    Raises:
        ValueError: the density is out of range, a score is not finite, or all scores are equal (equal scores
            do not rank the weights).
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must be in [0, 1], got {density}")
    flat = scores.reshape(-1)
    count = round(density * len(flat))
    if count in (0, len(flat)):
        return torch.full(scores.shape, bool(count), device=scores.device)
    if not bool(flat.isfinite().all()):
        raise ValueError(
            f"scores must be finite, but {int((~flat.isfinite()).sum())} of {len(flat)} scores are not finite"
        )
    if bool((flat == flat[0]).all()):
        raise ValueError(f"scores must differ to rank the weights, but all scores are {float(flat[0]):g}")
    bound = flat.kthvalue(len(flat) - count + 1).values
    mask = flat > bound
    equal = (flat == bound).nonzero().squeeze(-1)
    mask[equal[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def unit_scores(scores: Tensor, dim: int) -> Tensor:
    """Return the mean score of each neuron.

    Args:
        scores: the scores of the entries of a weight, in the shape of the weight.
        dim: the dimension of the weight that has one entry per neuron.

    Returns:
        [number of neurons]. If ``scores`` is a vector, it is returned unchanged.
    """
    return scores.movedim(dim, 0).flatten(1).mean(1) if scores.ndim > 1 else scores


def unit_mask(units: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Expand a mask of neurons to all entries of a weight.

    Args:
        units: [number of neurons], the mask of the neurons.
        shape: shape of the weight.
        dim: the dimension of the weight that has one entry per neuron.

    Returns:
        A bool mask of shape ``shape``.
    """
    view = [1] * len(shape)
    view[dim] = -1
    return units.reshape(view).expand(shape).contiguous()


def fisher_ratio(edit: Tensor, general: Tensor, *, damping: float = 0.1) -> Tensor:
    """Return ``edit / (general + damping * mean(general))``, which is high for weights that only the edits need.

    Without damping, the ratio would be highest where ``edit`` and ``general`` are both noise. The damping is relative
    to the mean of ``general``, so the ranking does not depend on the scale of ``edit`` or ``general``.

    Args:
        edit: Fisher information on the edits, any shape.
        general: Fisher information on general texts, the same shape.
        damping: fraction of the mean of ``general`` that is added to the denominator.

    Returns:
        The ratio, in the same shape.
    """
    return edit / (general + damping * general.mean())
