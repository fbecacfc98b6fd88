"""The state of an edit under way, as a file beside the host's checkpoint: safetensors, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError

FILE = "kedit_state.safetensors"


def save_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Write ``state`` (nested dicts of tensors and of what JSON holds, string keys) into a checkpoint's folder."""
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_split(state, "", tensors))
    path = Path(folder) / FILE
    with writing(path) as unfinished:
        save_file(tensors, unfinished, metadata={"state": plain, "sha256": _digest(plain, tensors)})
    return path


def load_state(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read what :func:`save_state` wrote; None where the folder holds none.

    Raises:
        EditError: the file is there and cannot be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
            if metadata["sha256"] != _digest(metadata["state"], tensors):
                raise KeyError("its contents are not those that were written")
            plain = json.loads(metadata["state"])
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise EditError(f"{path} is no whole state of an edit ({error}); resume from an earlier checkpoint") from error
    return _join(plain, "", tensors)


def _digest(plain: str, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(plain.encode())
    for key in sorted(tensors):
        found.update(key.encode())
        found.update(tensors[key].flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _split(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value.detach().cpu().contiguous()
        return {"__tensor__": key}
    if isinstance(value, dict):
        return {name: _split(part, f"{key}/{name}", tensors) for name, part in value.items()}
    return value


def _join(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__tensor__"}:
            return tensors[value["__tensor__"]]
        return {name: _join(part, f"{key}/{name}", tensors) for name, part in value.items()}
    return value
