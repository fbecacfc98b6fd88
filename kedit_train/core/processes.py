"""The rank of this process and the number of processes in a distributed run."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist

from kedit_train.errors import EditError

# Launchers set one of these variables to the number of processes: torchrun, Intel MPI, Open MPI, MVAPICH2.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def has_process_group() -> bool:
    """Return whether torch's default process group has been initialized, with any number of processes."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes in the default process group, or 1 without a process group."""
    return dist.get_world_size() if has_process_group() else 1


def rank() -> int:
    """Return the rank of this process, or 0 without a process group."""
    return dist.get_rank() if has_process_group() else 0


def is_distributed() -> bool:
    """Return whether more than one process takes part in this training."""
    return world_size() > 1


def check_launcher(environment: Mapping[str, str] | None = None) -> None:
    """Raise an error if ``accelerate launch`` was asked for several processes, but has started only one.

    On CPUs, ``accelerate launch --num_processes 2`` starts only one process (accelerate 1.15), unless ``--multi_gpu``
    or an MPI host file is given. The trainer then trains in one process without any message. accelerate does not tell
    the script how many processes were requested, but sets ``MASTER_ADDR`` if more than one was requested. Therefore,
    this function checks ``MASTER_ADDR``.

    Args:
        environment: environment variables; ``os.environ`` by default.

    Raises:
        EditError: the variables show that several processes were requested, and this process is not connected to any
            other.

    Example:
        >>> check_launcher({"ACCELERATE_USE_CPU": "True", "WORLD_SIZE": "1"})
    """
    variables = os.environ if environment is None else environment
    requested = "ACCELERATE_USE_CPU" in variables and "MASTER_ADDR" in variables
    if requested and not is_distributed() and not any(name in variables for name in _SIZES):
        raise EditError(
            "accelerate launch was asked for several processes but started one, as it does on CPUs; use torchrun "
            "--nproc-per-node N, with use_cpu=True in the training arguments. To train in one process, pass "
            "--num_processes 1 and unset MASTER_ADDR."
        )
