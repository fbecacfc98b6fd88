"""The delta file: changes and metadata as safetensors, verified byte for byte when it is read."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kedit_train.delta.tensor_change import LAYOUTS, Change
from kedit_train.errors import EditError
from kedit_train.safetensors_file import load_tensors, save_tensors
from kedit_train.safetensors_header import is_shape

FORMAT = 1
KIND = "kedit_train.delta"
# Files of at most this size (in bytes) are copied into memory when they are read. Larger files are copied to disk.
_IN_MEMORY = 1 << 26


def write(path: str | os.PathLike[str], changes: Mapping[str, Change], meta: Mapping[str, Any]) -> Path:
    """Write changes and metadata to a file. An existing file is replaced, and parent folders are created.

    The file is written atomically. If the process is killed during writing, the previous file stays in place.

    Args:
        path: the path of the file.
        changes: the change of each tensor, by name.
        meta: plain values, as in :class:`~kedit_train.delta.EditDelta`.

    Raises:
        EditError: ``meta`` cannot be saved as JSON, or :func:`read` would refuse a file with this metadata.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, change in changes.items():
        parts = {"before": change.before, "after": change.after, "index": change.index}
        tensors |= {f"{part}/{name}": value for part, value in parts.items() if value is not None}
        described[name] = {
            "layout": change.layout,
            "shape": list(change.shape),
            "base": change.base,
            "tied": list(change.tied),
        }
    try:
        _check_meta(json.loads(json.dumps(meta)))
    except EditError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise EditError(
            f"the metadata of the delta is not valid ({type(error).__name__}: {error}); use only JSON values, "
            "and the keys that the docstring of EditDelta lists."
        ) from error
    return save_tensors(path, tensors, {**meta, "format": FORMAT, "tensors": described}, kind=KIND)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Change], dict[str, Any]]:
    """Read a file that :func:`write` wrote, and verify every byte.

    The tensors are copied, so the file may be replaced, changed or deleted afterwards. A file of up to 64 MiB is copied
    into memory. A larger file is copied to disk, and the copy is memory-mapped.

    Returns:
        Two values: a dict from the name of a tensor to its change, and the metadata.

    Raises:
        EditError: the file is not a delta, is damaged, was changed after it was written, or has a later format.
    """
    tensors, meta = load_tensors(path, kind=KIND, memory_map=False, memory_limit=_IN_MEMORY)
    try:
        if meta["format"] != FORMAT:
            raise EditError(
                f"the file has format {meta['format']!r}, but this version of kedit-train reads format {FORMAT}; "
                "upgrade kedit-train"
            )
        described = meta.pop("tensors")
        changes = {name: _change(name, entry, tensors) for name, entry in described.items()}
        # Files of version 0.1.0 spell the key in British English.
        if "licence" in meta["base"]:
            meta["base"]["license"] = meta["base"].pop("licence")
        _check_meta(meta)
    except EditError as error:
        raise EditError(f"{path} is not a valid delta: {error}") from error
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EditError(
            f"{path} is not a valid delta: its metadata is malformed or does not match its tensors ({reason}); save "
            "the delta again"
        ) from error
    if tensors:
        raise EditError(
            f"{path} is not a valid delta: the metadata does not mention tensor {next(iter(tensors))!r}; save the "
            "delta again"
        )
    return changes, meta


def _change(name: str, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Change:
    layout, shape, tied = entry["layout"], entry["shape"], entry["tied"]
    if layout not in LAYOUTS:
        raise EditError(
            f"tensor {name!r}: layout must be dense, rows, columns or entries, got {layout!r:.100}; save the delta "
            "again"
        )
    if not is_shape(shape):
        raise EditError(
            f"tensor {name!r}: the shape must be a list of integers that torch supports as a shape, got "
            f"{shape!r:.100}; save the delta again"
        )
    if not isinstance(tied, list) or not all(isinstance(other, str) for other in tied):
        raise EditError(
            f'tensor {name!r}: the field "tied" must be a list of tensor names, got {tied!r:.100}; save the delta again'
        )
    if not re.fullmatch("[0-9a-f]{64}", entry["base"]):
        raise EditError(
            f"tensor {name!r}: the hash of the base tensor must be a SHA-256 in hex, got {entry['base']!r:.100}; save "
            "the delta again"
        )
    index = None if layout == "dense" else tensors.pop(f"index/{name}")
    before, after = tensors.pop(f"before/{name}"), tensors.pop(f"after/{name}")
    change = Change(layout, index, before, after, tuple(shape), entry["base"], tuple(tied))
    try:
        change.check()
    except EditError as error:
        raise EditError(f"tensor {name!r}: {error}") from error
    return change


def _check_meta(meta: Mapping[str, Any]) -> None:
    """Check the types of all metadata. The code that prints, merges or uploads a delta relies on these types."""

    def strings(values: Any, *, optional: bool = False) -> bool:
        return all(isinstance(value, str) or (optional and value is None) for value in values)

    def is_valid(edits: Any) -> bool:
        count, parents = edits.get("count", 0), edits.get("parents", [])
        own = type(count) is int and count >= 0 and strings([edits.get("hash")], optional=True)
        return own and isinstance(parents, list) and all(is_valid(parent) for parent in parents)

    base, scores, versions = meta["base"], meta.get("scores", {}), meta.get("versions", {})
    if not isinstance(base["names"], list) or not strings([base["fingerprint"], *base["names"]]):
        raise EditError(
            'the metadata field "base" must have a fingerprint (a string) and names (a list of strings); save the '
            "delta again"
        )
    if not strings([base.get("name"), base.get("license")], optional=True):
        raise EditError(
            f"the name and the license of the base model must be strings or None, got {base.get('name')!r:.100} and "
            f"{base.get('license')!r:.100}; save the delta again"
        )
    if not is_valid(meta.get("edits", {})):
        raise EditError(
            'in the metadata field "edits" and its "parents", each hash must be a string or None, and each count an '
            f"integer >= 0, got {meta.get('edits', {})!r:.100}; save the delta again"
        )
    if not all(type(value) in (int, float) and math.isfinite(value) for value in scores.values()):
        raise EditError(
            f'in the metadata field "scores", every score must be a finite number, got {scores!r:.100}; correct the '
            "scores and save the delta again"
        )
    if not strings(versions.values()):
        raise EditError(
            f'the metadata field "versions" must contain only strings, got {versions!r:.100}; save the delta again'
        )
    json.dumps(meta.get("configuration"), allow_nan=False)
