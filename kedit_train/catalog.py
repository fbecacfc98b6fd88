"""Where the recipes and the callback fragments are: beside the package in a clone, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kedit_train.errors import EditError

Kind = Literal["recipes", "callbacks"]
PACKAGE = Path(__file__).resolve().parent


def folder(kind: Kind) -> Path:
    """The folder of the packaged recipes or fragments."""
    wheel = PACKAGE / "_catalog" / kind
    return wheel if wheel.is_dir() else PACKAGE.parent / kind


def names(kind: Kind) -> list[str]:
    """What can be named: every recipe or fragment, without the file's ending. ``edit.py`` is the entry, no recipe."""
    found = [file for file in folder(kind).glob("*") if file.suffix in (".yaml", ".py") and file.name != "edit.py"]
    return sorted(file.stem for file in found)


def packaged(path: str) -> Path | None:
    """What ``callbacks/NAME.yaml`` or ``recipes/NAME.yaml`` names in the catalogue, unless a file lies there."""
    given = Path(path)
    kind: Kind | None = next((k for k in ("callbacks", "recipes") if given.parent == Path(k)), None)
    if kind is None or given.is_file():
        return None
    found = folder(kind) / given.name
    return found if found.is_file() else None


def find(kind: Kind, name: str) -> Path:
    """A file of one's own (a path that exists) or one of the catalogue ("quickstart", "recipes/quickstart.yaml").

    Raises:
        EditError: neither is there; the message lists what is.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path(), Path(kind)):
        for ending in (path.suffix,) if path.suffix else (".yaml", ".py"):
            packaged = folder(kind) / (path.stem + ending)
            if packaged.is_file():
                return packaged
    raise EditError(f"no file {name!r}, and the catalogue has {kind} of these names only: {', '.join(names(kind))}")
