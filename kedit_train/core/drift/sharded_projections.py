"""Apply the projections of ``NullSpace`` and ``LowCurvature`` to weight changes that FSDP2 may have sharded."""

from __future__ import annotations

from torch import Tensor

from kedit_train.core.drift.shards import has_whole_rows, local_part, map_rows, map_whole, reduce_over_shards
from kedit_train.core.fsdp import shard_like
from kedit_train.functional.low_curvature import Curvature, project_low_curvature
from kedit_train.functional.null_space import FreeSpace, project_free, project_gradient_free


def remove_preserved(change: Tensor, space: FreeSpace) -> Tensor:
    """Remove the preserved directions from a weight change that may be sharded.

    Each process projects its own rows. If the change is sharded by columns, it is gathered first. See
    :func:`~kedit_train.functional.null_space.project_free`.

    Args:
        change: [out, in], possibly sharded.
        space: from :func:`~kedit_train.functional.null_space.free_space`, the same on every process.

    Returns:
        [out, in], sharded in the same way as the change.
    """
    return map_rows(lambda rows: project_free(rows, space), change)


def remove_preserved_from_gradient(gradient: Tensor, space: FreeSpace) -> Tensor:
    """Remove the preserved directions from a gradient that may be sharded.

    See :func:`~kedit_train.functional.null_space.project_gradient_free`.
    """
    return map_rows(lambda rows: project_gradient_free(rows, space), gradient)


def remove_high_curvature(change: Tensor, curvature: Curvature) -> Tensor:
    """Remove the directions of high curvature from a weight change that may be sharded.

    If the change is sharded by rows, each process projects its own rows, and the processes exchange only a small
    matrix. If the change is sharded by columns, it is gathered first. See
    :func:`~kedit_train.functional.low_curvature.project_low_curvature`.

    Args:
        change: [out, in], possibly sharded.
        curvature: from :func:`~kedit_train.functional.low_curvature.high_curvature`, the same on every process.

    Returns:
        [out, in], sharded in the same way as the change.
    """
    if not has_whole_rows(change):
        return map_whole(lambda whole: project_low_curvature(whole, curvature), change)
    # The eigenvectors of the output factor have one row per output, like the change.
    own = curvature._replace(left=local_part(shard_like(curvature.left, change)))
    return map_rows(
        lambda rows: project_low_curvature(rows, own, lambda pairs: reduce_over_shards(pairs, change, "sum")), change
    )
