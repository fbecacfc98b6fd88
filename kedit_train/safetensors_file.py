"""Write safetensors files with JSON metadata and a checksum, and verify the checksum when a file is read."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError
from kedit_train.safetensors_header import DTYPES, copy_tensors, map_tensors, parse_json, read_header

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Contents(NamedTuple):
    """The contents of a file.

    Args:
        tensors: dict from name to tensor. All tensors are on the CPU.
        metadata: the JSON value that was saved with the tensors. None if the file was saved with another
            ``kind`` or by another program.
    """

    tensors: dict[str, Tensor]
    metadata: Any


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Any = None, *, kind: str
) -> Path:
    """Write tensors and metadata atomically. An existing file is replaced, and parent folders are created.

    Args:
        path: the path of the file.
        tensors: dict from name to tensor. The tensors may be on any device, but two tensors must not share memory.
        metadata: any value that can be saved as JSON.
        kind: the kind of file, for example ``"kedit_train.delta"``. :func:`load_tensors` refuses files of another kind.

    Raises:
        EditError: ``metadata`` cannot be saved as JSON, or the file cannot be written, for example to a full disk.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = save_tensors(f"{folder.name}/a.safetensors", {"w": torch.ones(2)}, {"seed": 0}, kind="example")
        >>> load_tensors(path, kind="example")
        Contents(tensors={'w': tensor([1., 1.])}, metadata={'seed': 0})
    """
    path = Path(path)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = _to_json(metadata)
    try:
        with writing(path) as unfinished:
            save_file(on_cpu, unfinished, metadata={kind: text, f"{kind}.sha256": checksum(text, on_cpu)})
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise EditError(f"{path} cannot be written ({reason}); free disk space, or use another path.") from error
    return path


@contextmanager
def fill_tensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: Any = None,
    *,
    kind: str,
) -> Iterator[dict[str, Tensor]]:
    """Context manager: write a file through memory-mapped tensors, so that the file may be larger than memory.

    The ``with`` block fills the tensors. The disk space is allocated before the block begins. If the block ends without
    an error, the file is moved to ``path``. If the block raises an error, the unfinished file is deleted.

    Args:
        path: the path of the file.
        shapes: dict from the name of a tensor to (shape, dtype).
        metadata: any value that can be saved as JSON.
        kind: the kind of file, as in :func:`save_tensors`.

    Yields:
        A dict from name to tensor. Values that the block does not write are undefined.

    Raises:
        EditError: ``metadata`` cannot be saved as JSON.
        OSError: the disk has no space for the file, or the file cannot be written.
    """
    text = _to_json(metadata)
    # Tensors with large items come first, so that every tensor is aligned to its item size.
    names = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))
    entries: dict[str, Any] = {}
    end = 0
    for name in names:
        shape, dtype = shapes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    blank = "0" * 64
    header = json.dumps({"__metadata__": {kind: text, f"{kind}.sha256": blank}, **entries}).encode()
    # Spaces after the JSON are allowed; they align the data to eight bytes.
    header += b" " * (-len(header) % 8)
    with writing(path) as unfinished:
        _allocate(unfinished, 8 + len(header) + end)
        mapped = torch.from_file(str(unfinished), True, 8 + len(header) + end, dtype=torch.uint8)
        data = mapped[8 + len(header) :]
        tensors = {
            name: data[slice(*entries[name]["data_offsets"])].view(shapes[name][1]).view(shapes[name][0])
            for name in names
        }
        yield tensors
        sealed = header.replace(f'"{blank}"'.encode(), f'"{checksum(text, tensors)}"'.encode(), 1)
        start_of_file = len(header).to_bytes(8, "little") + sealed
        mapped[: len(start_of_file)] = torch.frombuffer(bytearray(start_of_file), dtype=torch.uint8)


def load_tensors(
    path: str | os.PathLike[str],
    *,
    kind: str,
    memory_map: bool = True,
    memory_limit: int | None = None,
    allow_unsigned: bool = False,
) -> Contents:
    """Read a file that :func:`save_tensors` or :func:`fill_tensors` wrote, and verify its checksum.

    Args:
        path: the path of the file.
        kind: the kind that the file was saved with.
        memory_map: True memory-maps the file, so that the tensors take no memory until they are used. As long as the
            tensors are in use, the file must not be changed in place: changes are not detected, and the process crashes
            if the file becomes shorter. False copies the tensors and then verifies the checksum of the copy. Later
            changes of the file have no effect on the copy.
        memory_limit: with ``memory_map=False``, the maximum size in bytes of a file that is copied into memory. A
            larger file is copied into a temporary file that no other program can change, and this copy is
            memory-mapped. None sets no limit.
        allow_unsigned: True also reads files of another kind and safetensors files of other programs. The checksums of
            these files are not verified.

    Raises:
        EditError: the file does not exist, is damaged, was changed after it was written, or is of another kind (unless
            ``allow_unsigned`` is True).
    """
    path = Path(path)
    spans, stored = read_header(path)
    signed = kind in stored and f"{kind}.sha256" in stored
    if not signed and not allow_unsigned:
        raise EditError(f"{path} is not a {kind.removeprefix('kedit_train.')} file of kedit-train; check the path.")
    if any(span.dtype is None or span.start % span.dtype.itemsize for span in spans.values()):
        raise EditError(f"{path} is damaged: a tensor has an unknown dtype or is not aligned; get the file again.")
    limit = sys.maxsize if memory_limit is None else memory_limit
    try:
        tensors = map_tensors(path, spans) if memory_map else copy_tensors(path, spans, limit)
    except EditError:
        raise
    except (OSError, ValueError) as error:
        raise EditError(f"{path} cannot be read: {error}") from error
    if signed and checksum(stored[kind], tensors) != stored[f"{kind}.sha256"]:
        raise EditError(f"{path} was changed after it was written (its SHA-256 differs); get the file again.")
    try:
        metadata = parse_json(stored[kind]) if signed else None
    except ValueError as error:
        raise EditError(f"{path} is damaged: the metadata is not usable JSON ({error}); get the file again.") from error
    return Contents(tensors, metadata)


def checksum(metadata: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of the metadata text and of the names, dtypes, shapes and bytes of CPU tensors.

    Memory-mapped tensors are hashed page by page, so even a large file needs little memory.
    """
    digest = hashlib.sha256(metadata.encode(errors="surrogatepass"))
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {dtype_name(value.dtype)} {list(value.shape)} ".encode(errors="surrogatepass"))
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor in row-major order. A contiguous tensor is not copied."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(b"") if flat.numel() == 0 else flat.view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``, for example ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _to_json(metadata: Any) -> str:
    try:
        text = json.dumps(metadata, allow_nan=False)
        parse_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise EditError(
            f"metadata cannot be saved as JSON ({error}); use only dicts, lists, strings, finite numbers, booleans and "
            "None."
        ) from error
    return text


def _allocate(path: Path, size: int) -> None:
    """Create a file of ``size`` bytes, and allocate disk space for all bytes.

    The file is memory-mapped later. Without allocated space, the disk could become full while the tensors are written,
    and the system would then kill the process.
    """
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                # Some file systems do not support allocation. There, zeros are written instead.
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        zeros = bytes(1 << 20)
        for start in range(0, size, len(zeros)):
            file.write(zeros[: size - start])
