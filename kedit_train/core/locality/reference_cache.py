"""Settings for storing reference hidden states, and a function that reads or computes these hidden states."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from kedit_train.arguments import check_arguments, from_mapping, one_of, optional
from kedit_train.atomic_write import remove_leftovers
from kedit_train.core.cache.hidden_state_store import parse_bytes
from kedit_train.core.cache.sequence_keys import hash_sequences
from kedit_train.core.locality.hidden_state_file import (
    Batch,
    ReferenceStates,
    collect_states,
    create_folder,
    read_states,
    write_states,
)
from kedit_train.core.processes import is_distributed
from kedit_train.errors import EditError
from kedit_train.paths import PATH

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ReferenceCache:
    """Settings for how :class:`~kedit_train.callbacks.KLLocality` and ``BatchAnchor`` store reference hidden states.

    Reference hidden states are computed by the model before the edit.

    Args:
        cache_dir: directory for the hidden states. None keeps the hidden states in memory for this run only.
            ``KLLocality`` writes one file to the directory. A later run on the same model and texts reads this file
            instead of computing the hidden states again. To find the file, ``KLLocality`` hashes all weights of the
            model. ``BatchAnchor`` writes only hidden states that do not fit within ``memory_limit``, and deletes its
            files after the run.
        dtype: dtype of the stored hidden states. None stores the hidden states without rounding, in the dtype in which
            the output head computes. A narrower dtype adds a rounding error. ``KLLocality`` then issues a warning that
            contains the divergence caused by this error. If ``KLLocality`` has a teacher, it stores probabilities of
            the teacher instead of hidden states. In this case, None means float32, and no warning is issued.
        memory_limit: maximum size of the hidden states in memory, in bytes or as a string such as "2GB". None sets no
            limit. If the limit is exceeded, ``KLLocality`` memory-maps its file, or raises an error if there is no
            ``cache_dir``. ``BatchAnchor`` writes all further hidden states to ``cache_dir``, or computes them again in
            every step if there is no ``cache_dir``.

    Raises:
        EditError: an argument is invalid.

    Example:
        >>> ReferenceCache("runs/cache", dtype="bfloat16", memory_limit="2GB").memory_bytes
        2000000000
    """

    cache_dir: str | Path | None = None
    _: KW_ONLY
    dtype: Dtype | None = None
    memory_limit: int | str | None = None

    def __post_init__(self) -> None:
        check_arguments(
            self,
            cache_dir=(self.cache_dir, optional(PATH)),
            dtype=(self.dtype, optional(one_of(("float32", "bfloat16", "float16")))),
        )
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit, "ReferenceCache")

    @classmethod
    def of(cls, value: ReferenceCache | str | Path | Mapping[str, Any] | None) -> ReferenceCache:
        """Convert ``value`` to a ``ReferenceCache``. ``value`` may be a directory or a mapping of arguments."""
        if isinstance(value, Mapping):
            return from_mapping(cls, value)
        return value if isinstance(value, ReferenceCache) else cls(value)

    @property
    def directory(self) -> Path | None:
        """``cache_dir`` as a ``Path``, or None."""
        return None if self.cache_dir is None else Path(self.cache_dir)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """``dtype`` as a ``torch.dtype``, or None."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    @property
    def memory_bytes(self) -> int | None:
        """``memory_limit`` in bytes, or None for no limit."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)


@torch.no_grad()
def compute_or_read(
    compute: Callable[[], Generator[Batch, None, None]],
    sequences: Sequence[Sequence[int]],
    *,
    cache: ReferenceCache,
    key: Callable[[], dict[str, str]],
    device: torch.device,
) -> tuple[ReferenceStates, bool]:
    """Read the reference tensors from a file that an earlier run wrote, or compute and store the tensors.

    Args:
        compute: returns a generator that yields the tensors batch by batch.
        sequences: one list of token ids per sequence.
        cache: settings for storing the tensors.
        key: function that describes the model and the settings on which the tensors depend. It is called only if
            ``cache`` has a ``cache_dir``.
        device: device for the communication between processes.

    Returns:
        The tensors, and whether they were read from a file.

    Raises:
        EditError: the tensors exceed ``memory_limit`` and there is no ``cache_dir``, or the file cannot be written or
            read back.
    """
    lengths, directory = [len(sequence) for sequence in sequences], cache.directory
    if directory is None:
        return collect_states(compute(), lengths, cache.memory_bytes), False
    full_key = json.dumps({**key(), "texts": hash_sequences(sequences)}, sort_keys=True)
    path = directory / f"{hashlib.sha256(full_key.encode()).hexdigest()[:32]}.safetensors"
    # Every process computes, because a sharded model needs all processes. One process per machine writes the file.
    writes = os.environ.get("LOCAL_RANK", "0") == "0"
    if writes:
        remove_leftovers(path)
    states = read_states(path, full_key, lengths, cache.memory_bytes)
    if _on_all_processes(states is not None, device):
        assert states is not None
        return states, True
    error = _error_of(lambda: create_folder(path)) if writes else None
    _raise_together(error, device)
    batches = compute()
    if writes:
        error = _error_of(lambda: write_states(batches, lengths, path, full_key))
    if error is None or is_distributed():
        # Processes that do not write must run the forward passes too, even after an error in the process that writes.
        for _ in batches:
            pass
    batches.close()
    _raise_together(error, device)
    states = read_states(path, full_key, lengths, cache.memory_bytes)
    if states is None:
        raise EditError(f"{path} was written but cannot be read back; use a cache_dir on a local disk.")
    return states, False


def _error_of(write: Callable[[], object]) -> EditError | None:
    try:
        write()
    except EditError as error:
        return error
    return None


def _raise_together(error: EditError | None, device: torch.device) -> None:
    """Raise an error on all processes if any process has an error, so that no process waits forever."""
    if not _on_all_processes(error is None, device):
        raise error or EditError("another process could not write to cache_dir; read the error of that process.")


def _on_all_processes(value: bool, device: torch.device) -> bool:
    if not is_distributed():
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
