"""Multiply weights by Kronecker factors. FSDP2 may have sharded the weights."""

from __future__ import annotations

from torch import Tensor

from kedit_train.core.drift.shards import left_product, map_rows
from kedit_train.core.fsdp import full_tensor
from kedit_train.functional.precision import full_precision
from kedit_train.functional.second_order import divergence_of_gradient, transform


def transform_matrix(matrix: Tensor, output_root: Tensor | None, input_root: Tensor) -> Tensor:
    """Return ``output_root @ matrix @ input_root``. The matrix may be sharded.

    :func:`~kedit_train.functional.second_order.transform` computes the same product for a complete matrix.

    Args:
        matrix: [out, in], possibly sharded. If it is sharded, it is gathered once.
        output_root: [out, out], the same on every process. None stands for the identity matrix.
        input_root: [in, in], the same on every process.

    Returns:
        [out, in], sharded in the same way as the matrix.
    """
    product = map_rows(lambda rows: transform(rows, None, input_root), matrix)
    with full_precision(matrix.device.type):
        return product if output_root is None else left_product(output_root, product)


def divergence(change: Tensor, output_moment: Tensor, input_moment: Tensor) -> Tensor:
    """Estimate the KL divergence per token that a weight change causes. The change may be sharded.

    :func:`~kedit_train.functional.second_order.second_order_divergence` computes the same for a complete change.

    Args:
        change: [out, in], possibly sharded.
        output_moment: [out, out], the same on every process.
        input_moment: [in, in], the same on every process.

    Returns:
        A scalar, the same on every process. It can be differentiated with respect to ``change``.
    """
    gradient = left_product(output_moment, map_rows(lambda rows: rows @ input_moment, change.detach()))
    return full_tensor(divergence_of_gradient(change, gradient))
