"""Split one evaluation across several processes; afterwards each process holds all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from kedit_train.core.processes import has_process_group, rank, world_size
from kedit_train.errors import EditError

Item = TypeVar("Item")
Result = TypeVar("Result")


def split_across_processes(
    work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], distributed: bool
) -> list[Result]:
    """Return ``work(items)``, one result per item.

    Args:
        work: computes one result per item.
        items: the same items on every process.
        distributed: let each process of the default group compute its share. Every process must call. An error on one
            process is raised on all of them, so that none waits forever.

    Raises:
        EditError: ``distributed`` without a process group, or ``work`` failed on one of the processes.
    """
    if not distributed:
        return work(items)
    if not has_process_group():
        raise EditError(
            "distributed=True needs a process group; call torch.distributed.init_process_group() first, or set "
            "distributed=False."
        )
    size = world_size()
    own: tuple[list[Result], str]
    try:
        own = (work(items[rank() :: size]), "")
    except EditError as error:
        own = ([], str(error))
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, own)
    for _, error in parts:
        if error:
            raise EditError(error)
    return [parts[i % size][0][i // size] for i in range(len(items))]
