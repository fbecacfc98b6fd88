"""Check the paths of files, without reading or writing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kedit_train.arguments import Rule
from kedit_train.errors import EditError


def is_path(value: Any) -> bool:
    """Return whether the value can be the path of a file: a non-empty ``str`` or ``Path`` without NUL characters."""
    return isinstance(value, str | os.PathLike) and os.fspath(value) != "" and "\0" not in os.fsdecode(value)


PATH = Rule("a non-empty path without NUL characters", is_path)
SAFETENSORS_PATH = Rule(
    "a path that ends in .safetensors, without NUL characters",
    lambda value: is_path(value) and Path(os.fsdecode(value)).suffix == ".safetensors",
)


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise an error if no file can have this path.

    Raises:
        EditError: the path is empty or contains a NUL character.
    """
    if not PATH.holds(path):
        raise EditError(f"{str(path)!r} cannot be written; give {PATH.expected}.")


def why_no_file(path: Path) -> str:
    """Return why ``path`` is not a file, and what to do. An error message that names the path ends with this text.

    Example:
        >>> why_no_file(Path("/dev/null"))
        'is not a regular file; give the path of a file'
    """
    if path.is_dir():
        return "is a folder; give the path of a file"
    if path.exists():
        return "is not a regular file; give the path of a file"
    return "does not exist; check the path"
