"""Store tensors that have one entry per token.

The tensors are kept in memory or in a safetensors file. Later runs can read the file and verify its checksum.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from kedit_train.errors import EditError, warn
from kedit_train.paths import check_path
from kedit_train.safetensors_file import fill_tensors, load_tensors

KIND = "kedit_train.reference_states"

# Indices of sequences, and the concatenated tensors of these sequences, [tokens of these sequences, ...] each.
Batch = tuple[Sequence[int], Sequence[Tensor]]


class ReferenceStates:
    """Tensors with one entry per token: hidden states, or a teacher's top-k log probabilities and token ids.

    Args:
        tensors: tensors of shape [tokens of all sequences, ...].
        lengths: number of tokens of each sequence.
        memory_mapped: whether the tensors stay on disk and are read on access.
    """

    def __init__(self, tensors: Sequence[Tensor], lengths: Sequence[int], *, memory_mapped: bool = False) -> None:
        self._tensors, self._starts = list(tensors), [0, *accumulate(lengths)]
        self.memory_mapped = memory_mapped

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Select the tokens of some sequences.

        Args:
            indices: indices of the sequences in ``lengths``.

        Returns:
            Each of ``tensors`` with only the tokens of these sequences, [tokens of these sequences, ...].
        """
        spans = [slice(self._starts[i], self._starts[i + 1]) for i in indices]
        return [torch.cat([tensor[span] for span in spans]) for tensor in self._tensors]


def collect_states(
    batches: Iterable[Batch], lengths: Sequence[int], memory_limit: int | None = None
) -> ReferenceStates:
    """Collect the tensors of all batches in memory.

    Args:
        batches: batches that together contain each sequence exactly once.
        lengths: number of tokens of each sequence.
        memory_limit: maximum size of the tensors in bytes. None sets no limit.

    Raises:
        EditError: the tensors exceed ``memory_limit``.
    """
    batches = iter(batches)
    first = next(batches)
    shapes = _shapes(first, sum(lengths))
    need = _nbytes(shapes)
    if memory_limit is not None and need > memory_limit:
        raise EditError(
            f"the reference hidden states take {need} bytes, but memory_limit is {memory_limit} bytes; set cache_dir "
            "to store them on disk, use fewer texts, or raise memory_limit."
        )
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    _fill(tensors, chain([first], batches), lengths)
    return ReferenceStates(list(tensors.values()), lengths)


def write_states(batches: Iterable[Batch], lengths: Sequence[int], path: Path, key: str) -> None:
    """Write the tensors of all batches to a file, with one batch at a time in memory.

    :func:`read_states` reads the file.

    Args:
        batches: batches that together contain each sequence exactly once.
        lengths: number of tokens of each sequence.
        path: path of the file. The file is written completely or not at all.
        key: a description of everything that the tensors depend on.

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
            f"cache_dir={str(path.parent)!r} ({error.strerror or error}); free disk space, set another cache_dir, or "
            "use fewer texts."
        ) from error


def read_states(
    path: Path, key: str, lengths: Sequence[int], memory_limit: int | None = None
) -> ReferenceStates | None:
    """Read a file that :func:`write_states` wrote, and verify its checksum.

    Args:
        path: path of the file.
        key: a description of everything that the tensors depend on. A file with another ``key`` is not used.
        lengths: number of tokens of each sequence.
        memory_limit: maximum total size of the tensors in memory, in bytes. If the tensors are larger, all of them stay
            on disk and are memory-mapped. None sets no limit.

    Returns:
        The tensors, or None if there is no usable file. If a file exists but cannot be used, a warning is issued.
    """
    # Unlike Path.is_file, this returns False for a path that cannot be accessed.
    if not os.path.isfile(path):
        return None
    try:
        tensors, metadata = load_tensors(path, kind=KIND)
        if metadata != key:
            raise EditError(f"{path} was not written for the texts and the model of this run.")
        if not tensors or any(tensor.shape[:1] != (sum(lengths),) for tensor in tensors.values()):
            raise EditError(f"{path} contains another number of tokens than this run's texts.")
    except EditError as error:
        warn(f"{error.args[0]} The reference hidden states are computed again.")
        return None
    states = ReferenceStates([tensors[name] for name in sorted(tensors)], lengths, memory_mapped=True)
    if memory_limit is None or states.nbytes <= memory_limit:
        in_memory = [tensors[name].clone() for name in sorted(tensors)]
        states = ReferenceStates(in_memory, lengths)
    return states


def create_folder(path: Path) -> None:
    """Create the directory of a file that will be written later, and check that the file can be written.

    Raises:
        EditError: the directory cannot be created or is not writable, or ``path`` itself is a directory.
    """
    check_path(path)
    directory = path.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(
            f"cache_dir={str(directory)!r} is not a directory and cannot be created ({error.strerror}); set "
            "another cache_dir."
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise EditError(
            f"cache_dir={str(directory)!r} is not writable; change its permissions or set another cache_dir."
        )
    if path.is_dir():
        raise EditError(f"{path} must be a file, but is a directory; remove the directory or set another cache_dir.")


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
