"""Save the state of an edit in the trainer's checkpoint folder, and load it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from kedit_train.arguments import cut
from kedit_train.errors import EditError
from kedit_train.safetensors_file import load_tensors, save_tensors

FILE = "kedit_state.safetensors"
_KIND = "kedit_train.state"
# In the JSON metadata, {"__tensor__": name} stands for the tensor that has this name in the file.
_TENSOR = "__tensor__"


def save_state(folder: str | os.PathLike[str], state: dict[str, Any], *, file: str = FILE) -> Path:
    """Write the state of an edit into a checkpoint folder, atomically.

    Args:
        folder: the checkpoint folder.
        state: nested dicts with string keys. The values are tensors or values that JSON can store.
        file: name of the file in the folder.

    Returns:
        The path of the file.
    """
    tensors: dict[str, Tensor] = {}
    metadata = _take_tensors(state, "", tensors)
    return save_tensors(Path(folder) / file, tensors, metadata, kind=_KIND)


def load_state(folder: str | os.PathLike[str], *, file: str = FILE) -> dict[str, Any] | None:
    """Read the state of an edit that :func:`save_state` wrote.

    Args:
        folder: the checkpoint folder.
        file: name of the file in the folder.

    Returns:
        The state, or None if the folder contains no state of an edit.

    Raises:
        EditError: the file is damaged, or was not written by :func:`save_state`.
    """
    path = Path(folder) / file
    if not path.is_file():
        return None
    try:
        contents = load_tensors(path, kind=_KIND, memory_map=False)
        state = _put_tensors(contents.metadata, contents.tensors)
        if not isinstance(state, dict):
            raise EditError(f"the metadata must be a mapping, got {type(state).__name__}.")
    except EditError as error:
        # The advice of the original error does not help here, and the new message already names the path.
        reason = re.split("; (?:get the file|check the path)", str(error))[0].rstrip(".")
        reason = reason.replace(f"{path} ", "the file ", 1)
        raise EditError(
            f"the state of the edit in {path} cannot be used; resume from an earlier checkpoint, or start again from "
            f"the unedited model. The reason: {reason}."
        ) from error
    return state


def _take_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` with each tensor replaced by its name, and put the tensors into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach()
        return {_TENSOR: key}
    if isinstance(value, dict):
        return {name: _take_tensors(part, f"{key}/{name}", tensors) for name, part in value.items()}
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`_take_tensors`: return ``value`` with its tensors.

    Raises:
        EditError: ``value`` names a tensor that the file does not contain.
    """
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            name = value[_TENSOR]
            if not isinstance(name, str) or name not in tensors:
                raise EditError(f"the metadata must name a tensor of this file, got {cut(repr(name), 80)}.")
            return tensors[name]
        return {name: _put_tensors(part, tensors) for name, part in value.items()}
    return value
