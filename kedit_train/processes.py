"""Count the processes that a launcher started, and close the process group at the end of a script."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping

import torch.distributed as dist

from kedit_train.core.processes import has_process_group
from kedit_train.errors import EditError


def launched_processes(environment: Mapping[str, str] | None = None) -> int | None:
    """Return how many processes the launcher (``torchrun``, ``fabric run``, ``lightning run``) started.

    Args:
        environment: environment variables; ``os.environ`` by default.

    Returns:
        The number of processes, or None if no launcher was used.

    Example:
        >>> launched_processes({"WORLD_SIZE": "2"})
        2
    """
    variables = os.environ if environment is None else environment
    if variables.get("WORLD_SIZE"):
        return int(variables["WORLD_SIZE"])
    return 1 if variables.get("LT_CLI_USED") else None


def check_process_count(count: int, environment: Mapping[str, str] | None = None) -> None:
    """Check that a trainer uses all processes that the launcher started.

    If a trainer ignores the launcher, each process trains its own model on all data. The trainer itself reports no
    error.

    Args:
        count: the number of processes that the trainer uses, for example ``trainer.world_size``.
        environment: environment variables; ``os.environ`` by default.

    Raises:
        EditError: the number of processes of the trainer differs from the number that the launcher started.

    Example:
        >>> check_process_count(2, {"WORLD_SIZE": "2"})
    """
    launched = launched_processes(environment)
    if launched is not None and count != launched:
        raise EditError(
            f"the trainer uses {count} process(es) but the launcher started {launched}; remove the settings "
            f"trainer.devices and trainer.num_nodes, or let the launcher start {count} process(es)."
        )


def end_process_group() -> None:
    """Wait for all processes and close the process group, at the end of a script.

    Without this call, gloo (the CPU backend) sometimes aborts a process that exits before the communication between
    processes has ended. If there is no process group, the function does nothing.
    """
    if has_process_group():
        # Free the objects that refer to the process group before the group is destroyed.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
