"""Read the header and the tensors of a safetensors file, and check that the header is valid."""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kedit_train.arguments import cut
from kedit_train.errors import EditError
from kedit_train.paths import why_no_file

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The maximum size of a header in the safetensors format.
_MAX_HEADER_BYTES = 100_000_000
# Limits of torch: a tensor has at most 64 dimensions, and its number of entries must fit into a signed 64-bit integer.
_MAX_DIMENSIONS, _MAX_ENTRIES = 64, 2**63
# Limits for JSON. They are below the limits of Python: 4,300 digits of an integer, and 1,000 nested function calls.
_MAX_DIGITS, _MAX_DEPTH = 100, 400


@dataclass(frozen=True)
class Span:
    """The position of one tensor in a file.

    Args:
        dtype: the dtype of the tensor. None for a dtype that torch does not have.
        shape: the shape of the tensor.
        start: offset of the first byte of the tensor in the file.
        end: offset of the first byte after the tensor.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Span], dict[str, str]]:
    """Read the header of a safetensors file.

    The function checks that the header is not longer than the file, and that the tensors fill the rest of the file
    without gaps or overlaps.

    Returns:
        A dict from tensor name to :class:`Span`, and the metadata.

    Raises:
        EditError: the file does not exist, cannot be read, is cut short, or is not a valid safetensors file.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise EditError(f"file {str(path)!r} {why_no_file(path)}.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise EditError(
                    f"{path} is not a safetensors file, or is cut short (its header is longer than the file); check "
                    "the path, or get the file again."
                )
            text = file.read(length)
    except (OSError, ValueError) as error:
        if isinstance(error, EditError):
            raise
        raise EditError(f"{str(path)!r} cannot be read: {error}") from error
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise EditError("a metadata value is not a string")
        spans = {name: _span(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = str(error)
        if not isinstance(error, EditError):
            kind = "" if isinstance(error, ValueError) and reason else f"{type(error).__name__}: "
            reason = f"its header cannot be parsed ({(kind + reason).splitlines()[0]})"
        raise EditError(f"{path} is not a valid safetensors file: {reason}; get the file again.") from error
    end = 8 + length
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.start != end:
            raise EditError(
                f"{path} is damaged: tensor {name!r} does not begin where the previous tensor ends; get the file again."
            )
        end = span.end
    if end != size:
        raise EditError(
            f"{path} is cut short or damaged: the file has {size} bytes, but its header describes {end} bytes; get the "
            "file again."
        )
    return spans, metadata


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from a source that may not be trustworthy.

    Raises:
        ValueError: the text is not JSON, contains an integer of more than 100 digits, or has more than about 400
            nested levels.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        if not level:
            return value
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in inner for part in parts]
    raise ValueError(f"the JSON has more than {_MAX_DEPTH} levels")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer has more than {_MAX_DIGITS} digits")
    return int(text)


def is_shape(value: Any) -> bool:
    """Return whether a JSON value is a shape that a torch tensor can have."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    sizes = all(type(number) is int and 0 <= number < _MAX_ENTRIES for number in value)
    # Torch computes strides with max(1, size), so an empty tensor can overflow too.
    return sizes and math.prod(max(1, number) for number in value) < _MAX_ENTRIES


def read_tensor(path: str | os.PathLike[str], span: Span, name: str) -> Tensor:
    """Read one tensor into memory.

    Raises:
        EditError: torch does not have the dtype of the tensor.
    """
    if span.dtype is None:
        raise EditError(
            f"{path}: tensor {name!r} has a dtype that torch does not support; save the tensor in another dtype."
        )
    with open(path, "rb") as file:
        return _read(path, file, span)


def map_tensors(path: str | os.PathLike[str], spans: Mapping[str, Span]) -> dict[str, Tensor]:
    """Memory-map tensors: pages are read on first use, and writing to a tensor does not change the file."""
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _as_tensor(whole, span.start, span) for name, span in spans.items()}


def copy_tensors(path: str | os.PathLike[str], spans: Mapping[str, Span], memory_limit: int) -> dict[str, Tensor]:
    """Copy tensors, so that later changes of the file do not change the tensors.

    A file of up to ``memory_limit`` bytes is copied into memory. A larger file is copied into an unnamed temporary file
    on disk, and the returned tensors are memory-mapped from this copy. The system deletes the copy when the last of
    these tensors is deleted. The copy is in the folder of ``path`` or, if that is not possible, in the folder for
    temporary files.

    Raises:
        EditError: the file becomes shorter during the copy, or no folder has space for the copy.
    """
    size = max((span.end for span in spans.values()), default=0)
    with open(path, "rb") as file:
        if size <= memory_limit:
            return {name: _read(path, file, span) for name, span in spans.items()}
        problem: OSError | None = None
        for folder in (Path(path).parent, None):
            try:
                with tempfile.TemporaryFile(dir=folder) as private:
                    file.seek(0)
                    shutil.copyfileobj(file, private, 1 << 20)
                    private.flush()
                    if os.fstat(private.fileno()).st_size < size:
                        raise EditError(f"{path} was cut short while it was read; get the file again.")
                    whole = mmap.mmap(private.fileno(), 0, access=mmap.ACCESS_COPY)
                return {name: _as_tensor(whole, span.start, span) for name, span in spans.items()}
            except OSError as error:
                problem = error
    raise EditError(
        f"could not make a temporary copy of {path} on disk ({problem}); the file is too large to copy into memory. "
        "Free disk space, or set TMPDIR to a folder with more space."
    )


def _read(path: str | os.PathLike[str], file: BinaryIO, span: Span) -> Tensor:
    buffer = bytearray(span.end - span.start)
    file.seek(span.start)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise EditError(f"{path} was cut short while it was read; get the file again.")
    return _as_tensor(buffer, 0, span)


def _span(entry: Any, data_start: int) -> Span:
    start, end = entry["data_offsets"]
    shape, dtype = entry["shape"], DTYPES.get(entry["dtype"])
    if not is_shape(shape):
        raise EditError(
            f"a shape must be a list of at most {_MAX_DIMENSIONS} integers >= 0 with a product below 2**63, got "
            f"{cut(repr(shape))}"
        )
    if not all(type(number) is int and number >= 0 for number in (start, end)) or end < start:
        raise EditError(f"the bytes of a tensor cannot go from {cut(repr(start))} to {cut(repr(end))}")
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise EditError(f"a tensor of dtype {entry['dtype']} and shape {shape} cannot have {end - start} bytes")
    return Span(dtype, tuple(shape), data_start + start, data_start + end)


def _as_tensor(buffer: bytearray | mmap.mmap, offset: int, span: Span) -> Tensor:
    dtype = span.dtype or torch.uint8
    if span.end == span.start:
        return torch.empty(span.shape, dtype=dtype)
    count = (span.end - span.start) // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(span.shape)
