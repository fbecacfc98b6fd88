"""Reference tensors per token: in memory, or in a checksummed safetensors file that later runs can use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from kedit_train.errors import EditError, warn
from kedit_train.safetensors_file import fill_tensors, load_tensors

KIND = "kedit_train.reference_states"

# Indices of sequences, and their tensors one after the other, [tokens of these sequences, ...] each.
Batch = tuple[Sequence[int], Sequence[Tensor]]


class ReferenceStates:
    """What is stored for every token of some sequences: hidden states, or a teacher's top-k log probabilities and ids.

    Args:
        tensors: [tokens of all sequences, ...] each.
        lengths: number of tokens of each sequence.
        memory_mapped: whether the tensors are on disk and read on access.
    """

    def __init__(self, tensors: Sequence[Tensor], lengths: Sequence[int], *, memory_mapped: bool = False) -> None:
        self._tensors, self._starts = list(tensors), [0, *accumulate(lengths)]
        self.memory_mapped = memory_mapped

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the tensors of these sequences one after the other, [tokens of these sequences, ...] each."""
        spans = [slice(self._starts[i], self._starts[i + 1]) for i in indices]
        return [torch.cat([tensor[span] for span in spans]) for tensor in self._tensors]


def collect_states(
    batches: Iterable[Batch], lengths: Sequence[int], memory_limit: int | None = None
) -> ReferenceStates:
    """Gather batches in memory.

    Args:
        batches: each sequence in exactly one batch.
        lengths: number of tokens of each sequence.
        memory_limit: bytes that the tensors may take. None sets no limit.

    Raises:
        EditError: the tensors take more memory than that.
    """
    batches = iter(batches)
    first = next(batches)
    shapes = _shapes(first, sum(lengths))
    need = _nbytes(shapes)
    if memory_limit is not None and need > memory_limit:
        raise EditError(
            f"the reference hidden states take {need} bytes and memory_limit is {memory_limit}; set cache_dir to keep "
            "them on disk, give fewer texts or a higher limit."
        )
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    _fill(tensors, chain([first], batches), lengths)
    return ReferenceStates(list(tensors.values()), lengths)


def write_states(batches: Iterable[Batch], lengths: Sequence[int], path: Path, key: str) -> None:
    """Write batches to a file as they come, without holding all of them in memory. :func:`read_states` reads it.

    Args:
        batches: each sequence in exactly one batch.
        lengths: number of tokens of each sequence.
        path: of the file. It is written completely or not at all.
        key: describes everything that the tensors depend on.

    Raises:
        EditError: the file cannot be written, for example because the disk is full.
    """
    batches = iter(batches)
    first = next(batches)
    shapes = _shapes(first, sum(lengths))
    try:
        with fill_tensors(path, shapes, key, kind=KIND) as tensors:
            _fill(tensors, chain([first], batches), lengths)
    except OSError as error:
        raise EditError(
            f"the reference hidden states take {_nbytes(shapes)} bytes and cannot be written to "
            f"cache_dir={str(path.parent)!r} ({error.strerror or error}); free disk space, name another directory or "
            "give fewer texts."
        ) from error


def read_states(
    path: Path, key: str, lengths: Sequence[int], memory_limit: int | None = None
) -> ReferenceStates | None:
    """Read a file of :func:`write_states` and verify its checksum.

    Args:
        path: of the file.
        key: as it was written.
        lengths: number of tokens of each sequence.
        memory_limit: more bytes than this stay on disk and are memory-mapped. None reads everything into memory.

    Returns:
        The states; None if there is no file, or, with a warning, if it is damaged or has another key.
    """
    # Unlike Path.is_file, this returns False for a path that cannot be accessed.
    if not os.path.isfile(path):
        return None
    try:
        tensors, metadata = load_tensors(path, kind=KIND)
        if metadata != key:
            raise EditError(f"{path} belongs to other texts or another model.")
        if not tensors or any(tensor.shape[:1] != (sum(lengths),) for tensor in tensors.values()):
            raise EditError(f"{path} has another number of tokens.")
    except EditError as error:
        warn(f"{error.args[0]} The reference hidden states are computed again.")
        return None
    states = ReferenceStates([tensors[name] for name in sorted(tensors)], lengths, memory_mapped=True)
    if memory_limit is None or states.nbytes <= memory_limit:
        in_memory = [tensors[name].clone() for name in sorted(tensors)]
        states = ReferenceStates(in_memory, lengths)
    return states


def check_writable(path: Path) -> None:
    """Make the directory of a file that will be written later.

    Raises:
        EditError: the directory cannot be made or written to, or a directory has the name of the file.
    """
    directory = path.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(
            f"cache_dir={str(directory)!r} is not a directory and cannot be made ({error.strerror}); name another."
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise EditError(
            f"cache_dir={str(directory)!r} is not writable; change its permissions or name another directory."
        )
    if path.is_dir():
        raise EditError(f"{path} is a directory where a file must be written; remove it or name another cache_dir.")


def _shapes(batch: Batch, total: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {str(i): ((total, *tensor.shape[1:]), tensor.dtype) for i, tensor in enumerate(batch[1])}


def _nbytes(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


def _fill(tensors: Mapping[str, Tensor], batches: Iterable[Batch], lengths: Sequence[int]) -> None:
    starts = [0, *accumulate(lengths)]
    for indices, values in batches:
        for i, value in enumerate(values):
            parts = value.cpu().split([lengths[index] for index in indices])
            for index, part in zip(indices, parts, strict=True):
                tensors[str(i)][starts[index] : starts[index + 1]] = part
