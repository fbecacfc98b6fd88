"""The rank of this process and the number of processes in a distributed run."""

from __future__ import annotations

import torch.distributed as dist


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
