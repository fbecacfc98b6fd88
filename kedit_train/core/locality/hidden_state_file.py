"""What a model answered on rows of tokens, kept to be compared with: in memory, or in a file that later runs share.

A file is plain safetensors, written as the answers come (never all of them in memory), and named by a key of all that
they depend on. It carries that key and a checksum of its data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kedit_train.atomic_write import unfinished_name
from kedit_train.errors import EditError

_KEY, _DIGEST = "kedit_train.answers", "kedit_train.sha256"
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}


class Answers:
    """For every row its answers: one tensor [tokens of the row, ...] or several side by side.

    Attributes:
        nbytes: of all answers; mapped: they lie on disk and are read when they are asked for.
    """

    def __init__(self, tensors: Sequence[Any], lengths: Sequence[int], nbytes: int, *, mapped: bool) -> None:
        self._tensors, self._starts = tensors, [0, *accumulate(lengths)]
        self.nbytes, self.mapped = nbytes, mapped

    def take(self, rows: Sequence[int]) -> list[Tensor]:
        """The answers of these rows one after the other, [tokens of all of them, ...] each."""
        spans = [slice(self._starts[i], self._starts[i + 1]) for i in rows]
        return [torch.cat([tensor[span] for span in spans]) for tensor in self._tensors]


def collect(
    batches: Iterable[tuple[Sequence[int], Sequence[Tensor]]],
    lengths: Sequence[int],
    *,
    path: Path | None = None,
    key: str = "",
    memory_limit: int | None = None,
) -> Answers | None:
    """Gather answers batch by batch.

    Args:
        batches: row numbers, each row once, and their answers one after the other, [tokens, ...], the same kinds every
            time.
        lengths: tokens of every row.
        path: of a file to be written, whole or not at all; then nothing is returned (:func:`load` opens it).
        key: what the answers depend on, as a text.
        memory_limit: bytes that they may take where there is no path.

    Raises:
        EditError: they would take more than that, or more than there is room for on the disk.
    """
    starts, total = [0, *accumulate(lengths)], sum(lengths)
    file: _File | None = None
    tensors: list[Tensor] = []
    try:
        for rows, answers in batches:
            if not tensors:
                shapes = [((total, *a.shape[1:]), a.dtype) for a in answers]
                if path is not None:
                    file = _File(path, shapes, key)
                    tensors = file.tensors
                else:
                    tensors = _in_memory(shapes, memory_limit)
            spans = [slice(starts[i], starts[i + 1]) for i in rows]
            for tensor, answer in zip(tensors, answers, strict=True):
                for span, part in zip(spans, answer.cpu().split([lengths[i] for i in rows]), strict=True):
                    tensor[span] = part
        if file is not None:
            file.close()
    finally:
        if file is not None:
            file.unfinished.unlink(missing_ok=True)
    return None if path is not None else Answers(tensors, lengths, sum(t.nbytes for t in tensors), mapped=False)


def load(path: Path, key: str, lengths: Sequence[int], memory_limit: int | None = None) -> Answers | None:
    """Open what :func:`collect` wrote; None where there is nothing, or, with a warning, something damaged or foreign.

    Every byte is read once, for the checksum. Answers of more than ``memory_limit`` bytes stay on disk, memory-mapped.
    """
    # Unlike Path.is_file, false for whatever cannot be looked at.
    if not os.path.isfile(path):
        return None
    try:
        if path.stat().st_size < 8:
            raise SafetensorError("it is cut off")
        file = safe_open(path, framework="pt")
        metadata, names = file.metadata() or {}, sorted(file.keys())
        if metadata.get(_KEY) != key:
            raise SafetensorError("it was made of other texts or another model")
        slices = [file.get_slice(name) for name in names]
        if not slices or any(part.get_shape()[:1] != [sum(lengths)] for part in slices):
            raise SafetensorError("it holds another number of tokens")
        start = _data_start(path)
        if metadata.get(_DIGEST) != _digest(
            torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8)[start:]
        ):
            raise SafetensorError("its checksum does not agree with its content")
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"{path} holds no answers of this model on these texts ({reason}); made anew", stacklevel=2)
        return None
    nbytes = path.stat().st_size - start
    mapped = memory_limit is not None and nbytes > memory_limit
    return Answers(slices if mapped else [part[:] for part in slices], lengths, nbytes, mapped=mapped)


def make_place(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        EditError: the folder cannot be made or written to, or another folder has the file's name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(
            f"store={str(path.parent)!r} is no folder and cannot be made one ({error.strerror}); name another"
        ) from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise EditError(f"store={str(path.parent)!r} cannot be written to; name another folder or change its rights")
    if path.is_dir():
        raise EditError(f"store: a folder lies where the file {path} belongs; remove it or name another store")


def _in_memory(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], memory_limit: int | None) -> list[Tensor]:
    need = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)
    if memory_limit is not None and need > memory_limit:
        raise EditError(
            f"the answers before the edit take {need} bytes and memory_limit allows {memory_limit}; give store=, a "
            "folder in which they are kept on disk, fewer texts or a higher limit"
        )
    return [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]


class _File:
    """A safetensors file that is filled in place; it has its name only when it is complete."""

    def __init__(self, path: Path, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], key: str) -> None:
        self.path = path
        self.unfinished = unfinished_name(path)
        entries, end = {}, 0
        for number, (shape, dtype) in enumerate(shapes):
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            entries[str(number)] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        blank = "0" * 64
        text = json.dumps({"__metadata__": {_KEY: key, _DIGEST: blank}, **entries})
        # Padded so that the data lie at multiples of eight.
        header = (text + " " * (-len(text.encode()) % 8)).encode()
        self._size = 8 + len(header) + end
        try:
            _allocate(self.unfinished, self._size)
            self._bytes = torch.from_file(str(self.unfinished), True, self._size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise self._refusal(error) from error
        self._write(0, len(header).to_bytes(8, "little") + header)
        self._at, self._data = 8 + header.index(blank.encode()), self._bytes[8 + len(header) :]
        self.tensors = [
            self._data[slice(*entries[str(n)]["data_offsets"])].view(dtype).view(shape)
            for n, (shape, dtype) in enumerate(shapes)
        ]

    def close(self) -> None:
        self._write(self._at, _digest(self._data).encode())
        self.tensors = []
        del self._bytes, self._data
        try:
            with self.unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.unfinished, self.path)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> EditError:
        if self.unfinished.is_file():
            self.unfinished.unlink()
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        return EditError(
            f"the answers before the edit take {self._size} bytes and could not be written to "
            f"store={str(self.path.parent)!r} ({reason}); make room there, name another folder or give fewer texts"
        )

    def _write(self, at: int, content: bytes) -> None:
        self._bytes[at : at + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _allocate(path: Path, size: int) -> None:
    """Make a file whose every byte has its place on the disk: a mapped one that has not kills whoever writes to it."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                # File systems that know no allocation.
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        zeros = bytes(1 << 20)
        for start in range(0, size, len(zeros)):
            file.write(zeros[: size - start])
        file.flush()
        os.fsync(file.fileno())


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _digest(data: Tensor) -> str:
    return hashlib.sha256(data.numpy().data).hexdigest()
