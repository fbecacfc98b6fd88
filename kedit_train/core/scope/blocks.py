"""Find the decoder block that contains a module."""

from __future__ import annotations

from torch import nn


def place_in_blocks(model: nn.Module, name: str) -> tuple[str, int]:
    """Find the decoder block that contains a module or a parameter.

    Args:
        model: the model.
        name: name of a module or of a parameter in ``model``.

    Returns:
        The name of the outermost ``nn.ModuleList`` that contains the module or parameter, and the index of the block in
        this list, for example ("model.layers", 7). If there is no such list, the result is (name, -1).
    """
    parts = name.split(".")
    for count in range(1, len(parts)):
        path = ".".join(parts[:count])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path, int(parts[count])
    return name, -1
