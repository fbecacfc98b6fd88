"""Find the directions of high curvature of a weight from K-FAC factors, and remove them from a change.

The cost of a weight change D [out, in] is ``vec(D)ᵀ G vec(D)``, where G is the Gauss-Newton matrix. K-FAC approximates
G by the Kronecker product of two factors. The input factor is A = E[x xᵀ] with the inputs x of the layer. The output
factor is S = E[g gᵀ] with the gradients g at the outputs of the layer.

Every direction is an outer product u vᵀ of an eigenvector u of S and an eigenvector v of A. Its curvature is the
product of the two eigenvalues. Directions are removed from D in the order of their curvature, largest first, until the
removed curvatures add up to at least the fraction ``energy`` of the sum of all curvatures.

References:
    "CrispEdit", arXiv 2602.15823.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_train.functional.precision import full_precision, widest


class Curvature(NamedTuple):
    """The directions of high curvature of a weight.

    A direction is the outer product of the eigenvectors ``left[:, i]`` and ``right[:, j]``. Its curvature is high if
    ``high[i, j]`` is 1. Eigenvectors that belong to no direction of high curvature are not stored.

    Attributes:
        left: [out, p], eigenvectors of the output factor.
        right: [in, q], eigenvectors of the input factor.
        high: [p, q], 1 for a direction of high curvature, 0 otherwise, in the dtype of ``left``.
        free: number of directions whose curvature is not high, divided by ``out * in``.
        energy: sum of the high curvatures, divided by the sum of all curvatures.
    """

    left: Tensor
    right: Tensor
    high: Tensor
    free: float
    energy: float


def high_curvature(
    output_factor: Tensor, input_factor: Tensor, energy: float, dtype: torch.dtype = torch.float32
) -> Curvature:
    """Find the directions of high curvature of a weight.

    A direction is the outer product of an eigenvector of S and an eigenvector of A. Its curvature is the product of the
    two eigenvalues.

    Args:
        output_factor: S, [out, out], symmetric and positive semi-definite.
        input_factor: A, [in, in], symmetric and positive semi-definite.
        energy: fraction in (0, 1). Directions are selected in the order of their curvature, largest first, until their
            curvatures add up to at least this fraction of the sum of all curvatures. Directions with the same curvature
            as the last selected direction are also selected.
        dtype: dtype of the result. The decomposition is computed in fp64.

    Returns:
        The selected directions.

    Raises:
        ValueError: the curvature is zero in every direction.
    """
    s, left = _eigen(output_factor)
    a, right = _eigen(input_factor)
    products = torch.outer(s, a)
    ordered = products.flatten().sort(descending=True).values
    cumulative = ordered.cumsum(0)
    if not float(cumulative[-1]) > 0.0:
        raise ValueError("the curvature must be > 0 in some direction, but is zero in every direction")
    high = products >= ordered[int((cumulative < energy * cumulative[-1]).sum())]
    # Eigenvalues are sorted, so the rows and columns with a high pair come first.
    p, q = int(high.any(1).sum()), int(high.any(0).sum())
    return Curvature(
        left[:, :p].to(dtype).contiguous(),
        right[:, :q].to(dtype).contiguous(),
        high[:p, :q].to(dtype).contiguous(),
        1.0 - float(high.double().mean()),
        float(products[high].sum() / cumulative[-1]),
    )


def _eigen(factor: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(widest(factor))
    return values.flip(0).clamp(min=0.0), vectors.flip(1)


def project_low_curvature(
    delta: Tensor, curvature: Curvature, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Remove the directions of high curvature from a change.

    The result equals ``U_S ((U_Sᵀ D U_A) * M) U_Aᵀ``. D is the change. The columns of U_S are all eigenvectors of the
    output factor, and the columns of U_A are all eigenvectors of the input factor. M is 0 for directions of high
    curvature, and 1 for all other directions. To save time, the function computes only the part of D in the directions
    of high curvature, and subtracts this part from D.

    Args:
        delta: [out, in], the change, in the dtype of the curvature. For a ``Conv1D``, pass the transposed change.
        curvature: from :func:`high_curvature`.
        reduce: None if ``delta`` is complete. If the rows of ``delta`` and of ``curvature.left`` are split over several
            processes, pass a function that sums a matrix [p, q] over all processes.

    Returns:
        [out, in].
    """
    with full_precision(delta.device.type):
        pairs = curvature.left.T @ delta @ curvature.right
        inner = (pairs if reduce is None else reduce(pairs)) * curvature.high
        return delta - curvature.left @ inner @ curvature.right.T
