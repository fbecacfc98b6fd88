"""Directions of a module's inputs that a change of its weight must not touch, and the projection that removes them.

For ``y = W k`` a change D leaves the answers on inputs K0 alone where ``D K0 = 0``: the null-space constraint of
AlphaEdit (arXiv 2410.02355), there applied to a closed-form update with an absolute threshold on singular values. Here
directions are chosen by their share of the inputs' energy, which means the same in every model and layer, and the
projection is applied to the whole difference from the reference: a projected *gradient* does not stay in the null space
under Adam, whose step divides entry by entry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kedit_train.functional.precision import full_precision, widest


def principal_directions(moment: Tensor, *, energy: float | None = 0.99, rank: int | None = None) -> Tensor:
    """Orthonormal directions that hold most of a second moment.

    Args:
        moment: [d, d], E[k kᵀ], symmetric.
        energy: the least share of the trace to hold, in (0, 1]; 1 takes every direction that can be told from the
            rounding of the moment (eigenvalues above ``d * eps`` of the greatest).
        rank: take this many directions instead (fewer where there are no more).

    Returns:
        [d, r] fp64, by falling eigenvalue. Costs one eigendecomposition in fp64.
    """
    values, vectors = torch.linalg.eigh(widest(moment))
    values, vectors = values.flip(0), vectors.flip(1)
    known = int((values > values[0] * len(values) * torch.finfo(moment.dtype).eps).sum())
    if rank is not None:
        return vectors[:, : min(rank, known)]
    held = values[:known].cumsum(0)
    short = held < (energy or 1.0) * held[-1] * (1.0 - 1e-12) if known else held
    return vectors[:, : min(int(short.sum()) + 1, known)]


def join_directions(first: Tensor, second: Tensor) -> Tensor:
    """Orthonormal directions that span both, [d, r1] and [d, r2] orthonormal; [d, at most r1 + r2]."""
    residual = second - first @ (first.T @ second)
    residual = residual - first @ (first.T @ residual)
    left, sizes, _ = torch.linalg.svd(residual, full_matrices=False)
    return torch.cat([first, left[:, sizes > 1e-6]], dim=1)


class FreeSpace(NamedTuple):
    """What a change may still use, as the smaller of two bases.

    Attributes:
        basis: [d, n], orthonormal.
        preserved: ``basis`` spans what is preserved (removed from a change), else what is free (kept of it).
        rank: number of preserved directions.
    """

    basis: Tensor
    preserved: bool
    rank: int


def free_space(directions: Tensor, dtype: torch.dtype = torch.float32) -> FreeSpace:
    """Prepare the projection away from ``directions``, [d, r] orthonormal in fp64; never more than d * d/2 numbers."""
    size, rank = directions.shape
    if 2 * rank <= size:
        return FreeSpace(directions.to(dtype).contiguous(), True, rank)
    complement = torch.linalg.qr(directions, mode="complete")[0][:, rank:]
    return FreeSpace(complement.to(dtype).contiguous(), False, rank)


def project_free(delta: Tensor, space: FreeSpace) -> Tensor:
    """Take the preserved directions out of each row: ``D - (D U) Uᵀ``, or ``(D N) Nᵀ`` where the rest N is smaller.

    Args:
        delta: [m, d], inputs along the last dimension (``nn.Linear``; transpose ``Conv1D``), in the basis' dtype.

    Returns:
        [m, d]. ``result @ U`` is zero up to rounding (about 1e-7 of ``delta`` in fp32). 4 m d min(r, d - r) operations.
    """
    with full_precision(delta.device.type):
        within = (delta @ space.basis) @ space.basis.T
        return delta - within if space.preserved else within
