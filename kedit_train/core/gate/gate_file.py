"""Save a gate next to its adapter, and load it again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.errors import EditError
from kedit_train.safetensors_file import load_tensors, save_tensors

# The name of the file in the folder of the adapter.
GATE_FILE = "gate.safetensors"
_KIND = "kedit_train.gate"
_FORMAT = 1


def save_gate(gate: Gate, folder: str | os.PathLike[str], **more: Any) -> Path:
    """Write the keys, the radii and the layer of a gate to ``gate.safetensors`` in a folder, and return the path.

    Args:
        gate: the gate.
        folder: the folder of the adapter.
        more: further metadata that can be saved as JSON.
    """
    metadata = {**more, "format": _FORMAT, "layer": gate.layer}
    return save_tensors(Path(folder) / GATE_FILE, {"keys": gate.keys, "radii": gate.radii}, metadata, kind=_KIND)


def save_gate_of(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write the gate that is installed on a model next to its adapter. Without a gate, nothing is written."""
    gate = find_gate(model)
    if gate is not None:
        save_gate(gate, folder)


def has_gate(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains the file of a gate."""
    return (Path(folder) / GATE_FILE).is_file()


def load_gate(folder: str | os.PathLike[str]) -> Gate:
    """Read the gate of an adapter folder.

    Raises:
        EditError: the file is missing, damaged, or of a newer format.
    """
    path = Path(folder) / GATE_FILE
    # The tensors are copied, because the folder may be replaced while the model is in use.
    tensors, metadata = load_tensors(path, kind=_KIND, memory_map=False)
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else None
        raise EditError(f"{path} must have the format {_FORMAT}, got {found!r}; load it with a newer kedit-train.")
    keys, radii, layer = tensors.get("keys"), tensors.get("radii"), metadata.get("layer")
    if keys is None or radii is None or not isinstance(layer, int) or keys.ndim != 2 or radii.shape != keys.shape[:1]:
        raise EditError(f"{path} must contain keys [keys, hidden], radii [keys] and a layer; save the adapter again.")
    return Gate(keys, radii, layer)
