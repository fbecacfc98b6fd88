"""One evaluation over several processes: each asks for some of the edits, all of them hold all the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from kedit_train.core.processes import has_process_group, rank, world_size
from kedit_train.errors import EditError

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared_out(
    work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], distributed: bool
) -> list[Result]:
    """``work(items)``, one result for each item; with ``distributed`` every process of the group does its share.

    Every process has to call. An error on one of them is raised on all, so that none waits for it in vain.
    """
    if not distributed:
        return work(items)
    if not has_process_group():
        raise EditError(
            "distributed=True needs processes to share the edits: call torch.distributed.init_process_group() first, "
            "or leave it out"
        )
    size = world_size()
    own: tuple[list[Result], str] = ([], "")
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
