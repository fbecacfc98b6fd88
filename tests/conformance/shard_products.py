"""Products, projections and sums of sharded matrices, next to the same functions of the complete matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kedit_train.core.checksums import first_not_finite
from kedit_train.core.drift import kronecker
from kedit_train.core.drift.sharded_projections import remove_high_curvature, remove_preserved
from kedit_train.core.drift.shards import left_product, map_whole, mean, total
from kedit_train.core.fsdp import full_tensor
from kedit_train.functional.low_curvature import high_curvature
from kedit_train.functional.null_space import free_space

# Two processes get three rows and two rows.
ROWS, COLUMNS = 5, 4


def moment(size: int) -> Tensor:
    values = torch.randn(2 * size, size, dtype=torch.float64)
    return values.T @ values


def functions() -> dict[str, Callable[[Tensor], Any]]:
    left, right = moment(ROWS), moment(COLUMNS)
    space = free_space(torch.linalg.qr(torch.randn(COLUMNS, 1, dtype=torch.float64))[0], torch.float64)
    curvature = high_curvature(left, right, 0.5, torch.float64)

    def gradient(matrix: Tensor) -> Tensor:
        leaf = matrix.detach().requires_grad_()
        kronecker.divergence(leaf, left, right).backward()
        return leaf.grad

    return {
        "left_product": lambda matrix: left_product(left, matrix),
        "map_whole": lambda matrix: map_whole(lambda whole: whole.cumsum(0).cumsum(1), matrix),
        "remove_preserved": lambda matrix: remove_preserved(matrix, space),
        "remove_high_curvature": lambda matrix: remove_high_curvature(matrix, curvature),
        "transform_matrix": lambda matrix: kronecker.transform_matrix(matrix, left, right),
        "transform_matrix without outputs": lambda matrix: kronecker.transform_matrix(matrix, None, right),
        "divergence": lambda matrix: kronecker.divergence(matrix, left, right),
        "gradient of the divergence": gradient,
        "mean": mean,
        "total": lambda matrix: total([matrix, matrix.square()]),
        "not finite": lambda matrix: first_not_finite([matrix, torch.log(matrix - matrix.min()), matrix]),
        "finite": lambda matrix: first_not_finite([matrix]),
        # The sum of each shard overflows, but its entries do not.
        "large": lambda matrix: first_not_finite([torch.full_like(matrix, 1e308)]),
    }


def compared(size: int) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, result for the sharded matrix and result for the complete matrix."""
    torch.manual_seed(0)
    matrix = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    mesh = init_device_mesh("cpu", (size,))
    for name, function in functions().items():
        for dim in (0, 1):
            if dim == 1 and name in ("not finite",):
                continue
            sharded = distribute_tensor(matrix, mesh, [Shard(dim)], src_data_rank=None)
            found = function(sharded)
            if isinstance(found, Tensor) and found.ndim:
                assert found.placements == sharded.placements, name
            yield (
                f"{name}, dimension {dim}",
                *(full_tensor(v.detach()).tolist() if isinstance(v, Tensor) else v for v in (found, function(matrix))),
            )
