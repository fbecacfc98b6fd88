"""Save a gate next to its adapter, and read it again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kedit_train.compatibility import sha256_of_file
from kedit_train.errors import EditError
from kedit_train.safetensors_file import load_tensors, save_tensors

# The name of the file in the folder of the adapter.
GATE_FILE = "gate.safetensors"
# PEFT saves the weights of an adapter in one of these files.
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_KIND = "kedit_train.gate"
_FORMAT = 1


class SavedGate(NamedTuple):
    """The contents of a gate file.

    Attributes:
        keys: the stored hidden states that open the gate, [keys, hidden].
        radii: the radius of each key, [keys]. A hidden state within the radius of a key opens the gate.
        layer: index of the decoder block whose inputs are compared with the keys.
        files: the files that :func:`~kedit_train.core.gate.adapter_folder.save_adapter` wrote next to the gate.
    """

    keys: Tensor
    radii: Tensor
    layer: int
    files: list[str]


def save_gate(gate: Any, folder: str | os.PathLike[str], files: list[str] | None = None) -> Path:
    """Write a gate to ``gate.safetensors`` in the folder of its adapter, and return the path.

    The file contains a hash of the saved weights of the adapter, so that the gate is never used with another adapter.

    Args:
        gate: a :class:`~kedit_train.core.gate.gate.Gate`.
        folder: the folder in which PEFT has saved the adapter.
        files: the files in this folder that belong to the adapter.

    Raises:
        EditError: the folder contains no weights of an adapter, or the file cannot be written.
    """
    weights = _adapter_hash(folder)
    if weights is None:
        raise EditError(
            f"a gate can only be saved next to its adapter, but {folder} contains no {WEIGHT_FILES[0]}; save the "
            "adapter in this folder first."
        )
    metadata = {"format": _FORMAT, "layer": gate.layer, "adapter_sha256": weights, "files": files or []}
    return save_tensors(Path(folder) / GATE_FILE, {"keys": gate.keys, "radii": gate.radii}, metadata, kind=_KIND)


def has_gate(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains a gate file.

    The result is also True if ``gate.safetensors`` is a folder or a broken link. Reading the gate then raises an error.
    """
    return os.path.lexists(Path(folder) / GATE_FILE)


def read_gate(folder: str | os.PathLike[str], *, other_adapter: bool = False) -> SavedGate:
    """Read the gate from the folder of an adapter.

    Args:
        folder: the folder of the adapter.
        other_adapter: True skips the check that the gate belongs to the adapter weights in the folder.

    Raises:
        EditError: the file is missing, damaged or of a newer format. Unless ``other_adapter`` is True, this error is
            also raised if the folder contains no adapter weights, or if the gate belongs to other weights.
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
    weights = None if other_adapter else _adapter_hash(folder)
    if not other_adapter and weights is None:
        raise EditError(f"{folder} has a gate, but no adapter weights ({WEIGHT_FILES[0]}); save the adapter again.")
    if not other_adapter and metadata.get("adapter_sha256") != weights:
        raise EditError(
            f"{path} is the gate of other adapter weights, so it cannot be used with the weights in this folder; save "
            f"the adapter and its gate again, or delete {GATE_FILE} if the adapter was trained without a gate."
        )
    files = metadata.get("files")
    return SavedGate(keys, radii, layer, [str(name) for name in files] if isinstance(files, list) else [])


def _adapter_hash(folder: str | os.PathLike[str]) -> str | None:
    """Return the SHA-256 of the saved weights of an adapter, or None if the folder contains no weights."""
    path = next((path for name in WEIGHT_FILES if (path := Path(folder) / name).is_file()), None)
    return None if path is None else sha256_of_file(path)
