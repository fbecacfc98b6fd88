"""Directions of a weight along which general behaviour hardly bends, by Kronecker-factored curvature.

CrispEdit (arXiv 2602.15823) asks that a change D of a weight [out, in] cost little in ``vec(D)ᵀ G vec(D)`` with the
Gauss-Newton matrix G, approximated as in K-FAC by A (x) S: A = E[a aᵀ] of the inputs, S = E[g gᵀ] of the gradients at
the outputs. Its eigenvectors are pairs u_i v_jᵀ of eigenvectors of S and A, with eigenvalues s_i a_j; those that hold
the share ``energy`` of the trace are taken out of D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kedit_train.functional.precision import full_precision, widest


class Curvature(NamedTuple):
    """The directions of high curvature: pairs of ``left[:, i]`` and ``right[:, j]`` where ``high[i, j]``.

    Only eigenvectors that take part in any such pair are kept.

    Attributes:
        left: [out, p]; right: [in, q]; high: [p, q], 1 for a pair that is taken out, in the dtype of ``left``.
        free: the share of all out * in directions that remains.
        energy: the share of the trace that the directions taken out hold.
    """

    left: Tensor
    right: Tensor
    high: Tensor
    free: float
    energy: float


def high_curvature(
    output_factor: Tensor, input_factor: Tensor, energy: float, dtype: torch.dtype = torch.float32
) -> Curvature:
    """Find the directions of high curvature.

    Args:
        output_factor: S, [out, out]; input_factor: A, [in, in]; both symmetric, positive semi-definite.
        energy: in (0, 1). Pairs sorted by falling s_i a_j, the one at which this share of their sum is reached is the
            threshold: what is not below it is taken out.
        dtype: of the result; the decomposition is made in fp64.

    Raises:
        ValueError: there is no curvature at all.
    """
    s, left = _eigen(output_factor)
    a, right = _eigen(input_factor)
    products = torch.outer(s, a)
    ordered = products.flatten().sort(descending=True).values
    held = ordered.cumsum(0)
    if not float(held[-1]) > 0.0:
        raise ValueError("the curvature is zero in every direction")
    high = products >= ordered[int((held < energy * held[-1]).sum())]
    # Eigenvalues fall, so every row and column with a high pair stands before those without.
    p, q = int(high.any(1).sum()), int(high.any(0).sum())
    return Curvature(
        left[:, :p].to(dtype).contiguous(),
        right[:, :q].to(dtype).contiguous(),
        high[:p, :q].to(dtype).contiguous(),
        1.0 - float(high.double().mean()),
        float(products[high].sum() / held[-1]),
    )


def _eigen(factor: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(widest(factor))
    return values.flip(0).clamp(min=0.0), vectors.flip(1)


def project_low_curvature(delta: Tensor, curvature: Curvature) -> Tensor:
    """Take the directions of high curvature out of a change.

    Equals U_S ((U_Sᵀ D U_A) * M) U_Aᵀ with all eigenvectors and M = 1 for low curvature; computed from what is taken
    out, which is the smaller part.

    Args:
        delta: [out, in] (transpose ``Conv1D``), in the dtype of the curvature.
    """
    with full_precision(delta.device.type):
        inner = (curvature.left.T @ delta @ curvature.right) * curvature.high
        return delta - curvature.left @ inner @ curvature.right.T
