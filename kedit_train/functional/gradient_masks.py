"""Which weights matter most: from scores to masks that keep an exact share of them."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top(scores: Tensor, density: float) -> Tensor:
    """Mark the highest scores: exactly ``round(density * n)`` of them, the first ones where several are equal.

    Args:
        scores: any shape, n finite numbers.
        density: share to keep, 0 to 1.

    Returns:
        A mask of the same shape, bool.

    Raises:
        ValueError: the density is out of bounds; a score is not finite; or all scores are equal, so that a share of
            them would be an arbitrary one.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density={density} is no share between 0 and 1")
    flat = scores.reshape(-1)
    count = round(density * len(flat))
    if count in (0, len(flat)):
        return torch.full(scores.shape, bool(count), device=scores.device)
    if not bool(flat.isfinite().all()):
        raise ValueError(f"{int((~flat.isfinite()).sum())} of {len(flat)} scores are not finite")
    if bool((flat == flat[0]).all()):
        raise ValueError(f"all scores are {float(flat[0]):g}, which tells none of them apart")
    bound = flat.kthvalue(len(flat) - count + 1).values
    mask = flat > bound
    equal = (flat == bound).nonzero().squeeze(-1)
    mask[equal[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def unit_scores(scores: Tensor, dim: int) -> Tensor:
    """Mean score of each neuron: [size(dim)] of scores [..., size(dim), ...]."""
    return scores.movedim(dim, 0).flatten(1).mean(1) if scores.ndim > 1 else scores


def unit_mask(units: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Give every entry of ``shape`` the mark of its neuron; ``units`` is [shape[dim]]."""
    view = [1] * len(shape)
    view[dim] = -1
    return units.reshape(view).expand(shape).contiguous()


def fisher_ratio(edit: Tensor, general: Tensor, *, damping: float = 0.1) -> Tensor:
    """Curvature that the edits have and other texts have not: ``edit / (general + damping * mean(general))``.

    Without damping the ratio would be highest where both are noise. Relative to the mean it does not depend on the
    scale of either.

    Args:
        edit: Fisher information on the edits, any shape.
        general: the same on general texts.
        damping: share of the general mean that is added to the denominator.
    """
    return edit / (general + damping * general.mean())
