"""Directions of a module's inputs that a change of its weight must preserve, and the projection that removes them.

For ``y = W k``, a change D keeps the outputs for inputs K0 if ``D K0 = 0``. AlphaEdit applies this to a closed-form
update, with an absolute threshold on singular values. Here the directions are chosen by their fraction of the energy of
the inputs, which means the same in every model and layer. The projection is applied to the whole difference from the
reference, because a projected gradient does not stay in the null space under Adam, whose step divides each entry.

References:
    "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", arXiv 2410.02355.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kedit_train.functional.precision import full_precision, widest


def principal_directions(moment: Tensor, *, energy: float | None = 0.99, rank: int | None = None) -> Tensor:
    """Return orthonormal directions that hold most of a second moment.

    Args:
        moment: [d, d], E[k kᵀ], symmetric.
        energy: smallest fraction of the trace that the directions must hold, in (0, 1]. 1 takes every direction whose
            eigenvalue is above the rounding error of the moment (``d * eps`` of the greatest eigenvalue).
        rank: number of directions, in place of ``energy``. There may be fewer.

    Returns:
        [d, r] in fp64, by falling eigenvalue.
    """
    values, vectors = torch.linalg.eigh(widest(moment))
    values, vectors = values.flip(0), vectors.flip(1)
    known = int((values > values[0] * len(values) * torch.finfo(moment.dtype).eps).sum())
    if rank is not None:
        return vectors[:, : min(rank, known)]
    cumulative = values[:known].cumsum(0)
    short = cumulative < (energy or 1.0) * cumulative[-1] * (1.0 - 1e-12) if known else cumulative
    return vectors[:, : min(int(short.sum()) + 1, known)]


def join_directions(first: Tensor, second: Tensor) -> Tensor:
    """Return orthonormal directions that span two sets of directions.

    Args:
        first: [d, r1], orthonormal.
        second: [d, r2], orthonormal.

    Returns:
        [d, r] with r at most r1 + r2.
    """
    residual = second - first @ (first.T @ second)
    residual = residual - first @ (first.T @ residual)
    left, sizes, _ = torch.linalg.svd(residual, full_matrices=False)
    return torch.cat([first, left[:, sizes > 1e-6]], dim=1)


class FreeSpace(NamedTuple):
    """The directions that a change may use, stored as the smaller of two bases.

    Attributes:
        basis: [d, n], orthonormal.
        preserved: if True, ``basis`` spans the preserved directions, which are removed from a change. If False, it
            spans the free directions, onto which a change is projected.
        rank: number of preserved directions.
    """

    basis: Tensor
    preserved: bool
    rank: int


def free_space(directions: Tensor, dtype: torch.dtype = torch.float32) -> FreeSpace:
    """Prepare the projection that removes directions.

    Args:
        directions: [d, r], orthonormal in fp64.
        dtype: dtype of the basis.

    Returns:
        The smaller of the two bases, at most d * d / 2 values.
    """
    size, rank = directions.shape
    if 2 * rank <= size:
        return FreeSpace(directions.to(dtype).contiguous(), True, rank)
    complement = torch.linalg.qr(directions, mode="complete")[0][:, rank:]
    return FreeSpace(complement.to(dtype).contiguous(), False, rank)


def project_free(delta: Tensor, space: FreeSpace) -> Tensor:
    """Remove the preserved directions from each row of a change.

    This is ``D - (D U) Uᵀ`` with the preserved directions U, or ``(D N) Nᵀ`` if the free basis N is smaller.

    Args:
        delta: [m, d], the change, with inputs along the last dimension (transpose the weight of a ``Conv1D``), in the
            dtype of the basis.
        space: from :func:`free_space`.

    Returns:
        [m, d]. ``result @ U`` is zero up to rounding, about 1e-7 of ``delta`` in fp32.
    """
    with full_precision(delta.device.type):
        within = (delta @ space.basis) @ space.basis.T
        return delta - within if space.preserved else within
