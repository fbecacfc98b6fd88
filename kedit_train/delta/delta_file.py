"""A delta as a safetensors file: there whole or not at all, and refused unless every byte is what was written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kedit_train.atomic_write import writing
from kedit_train.delta.bitwise import content, dtype_name
from kedit_train.delta.safetensors_header import is_shape, map_tensors, read_header
from kedit_train.delta.tensor_change import LAYOUTS, Change
from kedit_train.errors import EditError

FORMAT = 1
_META, _DIGEST = "kedit_train.delta", "kedit_train.delta.sha256"


def write(path: str | os.PathLike[str], changes: Mapping[str, Change], meta: Mapping[str, Any]) -> Path:
    """Write changes and JSON-like metadata; parent folders are made.

    The bytes go into a hidden file beside ``path``, are flushed to the disk, and take the name in one step. A process
    that is killed in between leaves that hidden file, which the next save removes, and what had the name before.

    Raises:
        EditError: ``meta`` does not fit JSON, or is not what :func:`read` accepts.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, change in changes.items():
        parts = {"before": change.before, "after": change.after, "index": change.index}
        tensors |= {f"{part}/{name}": value.contiguous() for part, value in parts.items() if value is not None}
        described[name] = {
            "layout": change.layout,
            "shape": list(change.shape),
            "base": change.base,
            "tied": list(change.tied),
        }
    try:
        text = json.dumps({**meta, "format": FORMAT, "tensors": described}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EditError(f"the delta's metadata do not fit JSON ({error}); give plain values") from error
    try:
        # What load would refuse is not written.
        _check_meta(json.loads(text))
    except (TypeError, AttributeError, KeyError) as error:
        raise EditError(f"the delta's metadata are not those of an edit ({type(error).__name__}: {error})") from error
    with writing(path) as unfinished:
        save_file(tensors, unfinished, metadata={_META: text, _DIGEST: _digest(text, tensors)})
    return path


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Change], dict[str, Any]]:
    """Read what :func:`write` wrote; tensors are mapped from the file and everything is checked, nothing executed.

    Raises:
        EditError: no delta, one of a later format, cut short, or not as it was written.
    """
    path = Path(path)
    spans, metadata = read_header(path)
    if _META not in metadata or _DIGEST not in metadata:
        raise EditError(f"{path} is no delta: no EditDelta.save wrote it; give the file that a run saved")
    if any(span.dtype is None or span.start % span.dtype.itemsize for span in spans.values()):
        raise EditError(f"{path} is damaged: a tensor of an unknown dtype or place")
    try:
        tensors = map_tensors(path, spans)
    except (OSError, ValueError) as error:
        raise EditError(f"{path} cannot be read: {error}") from error
    text = metadata[_META]
    if _digest(text, tensors) != metadata[_DIGEST]:
        raise EditError(f"{path} is not as it was written (its SHA-256 differs); get the file again")
    try:
        meta = json.loads(text)
        if meta["format"] != FORMAT:
            raise EditError(f"it is of format {meta['format']!r} and this version reads {FORMAT}; upgrade kedit-train")
        described = meta.pop("tensors")
        changes = {name: _change(name, entry, tensors) for name, entry in described.items()}
        _check_meta(meta)
    except EditError as error:
        raise EditError(f"{path} cannot be used: {error}") from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise EditError(f"{path} is no valid delta: {type(error).__name__}: {error}".splitlines()[0]) from error
    if tensors:
        raise EditError(f"{path} is no valid delta: it holds {next(iter(tensors))!r}, which belongs to no change")
    return changes, meta


def _change(name: str, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Change:
    layout, shape, tied = entry["layout"], entry["shape"], entry["tied"]
    if layout not in LAYOUTS or not is_shape(shape):
        raise EditError(f"{name!r}: an unknown layout or a shape that is none")
    if not all(isinstance(other, str) for other in tied):
        raise EditError(f"{name!r}: tied names that are no text")
    if not re.fullmatch("[0-9a-f]{64}", entry["base"]):
        raise EditError(f"{name!r}: no hash of the base")
    index = None if layout == "dense" else tensors.pop(f"index/{name}")
    before, after = tensors.pop(f"before/{name}"), tensors.pop(f"after/{name}")
    change = Change(layout, index, before, after, tuple(shape), entry["base"], tuple(tied))
    try:
        change.check()
    except EditError as error:
        raise EditError(f"{name!r}: {error}") from error
    return change


def _check_meta(meta: Mapping[str, Any]) -> None:
    """Refuse metadata of other types than are written: whoever looks at, merges or sends a delta relies on them."""

    def texts(value: Any, *, optional: bool = False) -> bool:
        return all(isinstance(one, str) or (optional and one is None) for one in value)

    def described(edits: Any) -> bool:
        count, parents = edits.get("count", 0), edits.get("parents", [])
        fine = type(count) is int and count >= 0 and texts([edits.get("hash")], optional=True)
        return fine and isinstance(parents, list) and all(described(parent) for parent in parents)

    base, scores, versions = meta["base"], meta.get("scores", {}), meta.get("versions", {})
    if not isinstance(base["names"], list) or not texts([base["fingerprint"], *base["names"]]):
        raise EditError("no fingerprint or names of the base")
    if not texts([base.get("name"), base.get("licence")], optional=True):
        raise EditError("a name or licence of the base that is no text")
    if not described(meta.get("edits", {})):
        raise EditError("edits that are not described by a hash and a count")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in scores.values()):
        raise EditError("a score that is no finite number")
    if not texts(versions.values()):
        raise EditError("versions that are no text")
    json.dumps(meta.get("configuration"), allow_nan=False)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"\n{key} {dtype_name(value.dtype)} {list(value.shape)} ".encode(errors="surrogatepass"))
        digest.update(content(value))
    return digest.hexdigest()
