"""The packaged recipes and callback fragments, found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kedit_train.errors import EditError

Kind = Literal["recipes", "callbacks"]
PACKAGE = Path(__file__).resolve().parent


def folder(kind: Kind) -> Path:
    """Return the folder of the packaged recipes or fragments: inside the package in a wheel, beside it in a clone."""
    wheel = PACKAGE / "_catalog" / kind
    return wheel if wheel.is_dir() else PACKAGE.parent / kind


def names(kind: Kind) -> list[str]:
    """Return the names of all recipes or fragments, without file endings.

    Example:
        >>> "quickstart" in names("recipes")
        True
    """
    # edit.py is the script that runs all recipes, and not a recipe.
    files = [file for file in folder(kind).glob("*") if file.suffix in (".yaml", ".py") and file.name != "edit.py"]
    return sorted(file.stem for file in files)


def packaged(path: str) -> Path | None:
    """Return the packaged file that ``callbacks/NAME.yaml`` or ``recipes/NAME.yaml`` names; None for any other path.

    A file of this name in the current folder takes precedence, so None is returned for it too.
    """
    given = Path(path)
    kind: Kind | None = next((k for k in ("callbacks", "recipes") if given.parent == Path(k)), None)
    if kind is None or given.is_file():
        return None
    file = folder(kind) / given.name
    return file if file.is_file() else None


def find(kind: Kind, name: str) -> Path:
    """Return the path of a file: one of the user, or a packaged one ("quickstart", "recipes/quickstart.yaml").

    Raises:
        EditError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path(), Path(kind)):
        for ending in (path.suffix,) if path.suffix else (".yaml", ".py"):
            file = folder(kind) / (path.stem + ending)
            if file.is_file():
                return file
    raise EditError(f"file {name!r} does not exist, and no packaged file has this name; the packaged {kind} are "
                    f"{', '.join(names(kind))}.")  # fmt: skip
