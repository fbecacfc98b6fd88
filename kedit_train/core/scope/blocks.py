"""Find the decoder block that contains a module."""

from __future__ import annotations

from torch import nn


def place_in_blocks(model: nn.Module, name: str) -> tuple[str, int]:
    """Return the path of the first list of modules on the way to a module or parameter, and the index in this list.

    Args:
        model: the model.
        name: name of a module or of a parameter in ``model``.

    Returns:
        For example ("model.layers", 7). If no list of modules contains the module, the result is (name, -1).
    """
    parts = name.split(".")
    for count in range(1, len(parts)):
        path = ".".join(parts[:count])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path, int(parts[count])
    return name, -1
