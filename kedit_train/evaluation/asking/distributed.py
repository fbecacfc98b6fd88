"""Split one evaluation across several processes, and return all results on each process."""

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
    """Return ``work(items)``, computed on one process or split across all processes.

    Args:
        work: computes one result per item.
        items: the same items on every process.
        distributed: if True, each process of the default group computes the results for a part of the items. Every
            process must then call this function. An error on one process is raised on all processes, so that no process
            waits forever.

    Returns:
        One result per item, on every process.

    Raises:
        EditError: ``distributed`` is True but there is no process group, or ``work`` failed on one of the processes.
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
