"""Find the directions of high curvature of a weight from K-FAC factors, and remove them from a change.

The cost of a change D of a weight [out, in] is ``vec(D)ᵀ G vec(D)`` with the Gauss-Newton matrix G. K-FAC approximates
G by the Kronecker product of A = E[a aᵀ] (inputs) and S = E[g gᵀ] (gradients at the outputs). The eigenvectors of the
product are pairs u_i v_jᵀ of eigenvectors of S and A, with eigenvalues s_i a_j. The pairs are removed from D
in the order of their eigenvalues, largest first, until the eigenvalues of the removed pairs add up to at least the
fraction ``energy`` of the trace of the product.

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

    A direction is a pair of the eigenvectors ``left[:, i]`` and ``right[:, j]``. Its curvature is high if
    ``high[i, j]`` is 1. Eigenvectors that belong to no pair of high curvature are not stored.

    Attributes:
        left: [out, p], eigenvectors of the output factor.
        right: [in, q], eigenvectors of the input factor.
        high: [p, q], 1 for a pair of high curvature, 0 otherwise, in the dtype of ``left``.
        free: fraction of all ``out * in`` directions whose curvature is not high.
        energy: fraction of the sum of all curvatures that belongs to the directions of high curvature.
    """

    left: Tensor
    right: Tensor
    high: Tensor
    free: float
    energy: float


def high_curvature(
    output_factor: Tensor, input_factor: Tensor, energy: float, dtype: torch.dtype = torch.float32
) -> Curvature:
    """Find the directions of high curvature, which the caller removes from a weight change.

    The curvature is the Kronecker product of S and A. If s_i and a_j are eigenvalues of S and A, then s_i a_j is an
    eigenvalue of the curvature. Its direction is the outer product of the two eigenvectors.

    Args:
        output_factor: S, [out, out], symmetric and positive semi-definite.
        input_factor: A, [in, in], symmetric and positive semi-definite.
        energy: fraction of the trace of the curvature that the result contains, in (0, 1). Directions are selected by
            s_i a_j, largest first, until the selected eigenvalues add up to this fraction of the trace. Directions with
            the same eigenvalue as the last selected direction are also selected.
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

    The result equals ``U_S ((U_Sᵀ D U_A) * M) U_Aᵀ``. D is the change. U_S contains all eigenvectors of the output
    factor, and U_A those of the input factor. M is 1 for pairs of low curvature and 0 for pairs of high curvature. To
    save time, the function computes only the part of D in the pairs of high curvature, and subtracts this part from D.

    Args:
        delta: [out, in], the change, in the dtype of the curvature. For a ``Conv1D``, pass the transposed change.
        curvature: from :func:`high_curvature`.
        reduce: None if ``delta`` is complete. If each process has only some rows of ``delta`` and the same rows of
            ``curvature.left``: a function that sums a matrix [p, q] over all processes.

    Returns:
        [out, in].
    """
    with full_precision(delta.device.type):
        pairs = curvature.left.T @ delta @ curvature.right
        inner = (pairs if reduce is None else reduce(pairs)) * curvature.high
        return delta - curvature.left @ inner @ curvature.right.T
