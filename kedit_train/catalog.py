"""Find the packaged recipes and callback fragments by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kedit_train.errors import EditError

Kind = Literal["recipes", "callbacks"]
PACKAGE = Path(__file__).resolve().parent


def folder(kind: Kind) -> Path:
    """Return the folder of the packaged recipes or callback fragments.

    A callback fragment is a YAML file that contains only callbacks, to be added to a recipe.
    In a wheel, the folder is inside the package. In a clone of the repository, the folder is next to the package.
    """
    wheel = PACKAGE / "_catalog" / kind
    return wheel if wheel.is_dir() else PACKAGE.parent / kind


def names(kind: Kind) -> list[str]:
    """Return the names of all packaged recipes or callback fragments, without file extensions.

    Example:
        >>> "quickstart" in names("recipes")
        True
    """
    # edit.py is not a recipe, but the script that runs the recipes.
    files = [file for file in folder(kind).glob("*") if file.suffix in (".yaml", ".py") and file.name != "edit.py"]
    return sorted(file.stem for file in files)


def packaged(path: str) -> Path | None:
    """Return the packaged file for ``callbacks/NAME.yaml`` or ``recipes/NAME.yaml``, and None for any other path.

    If a file with this path exists in the current folder, the function returns None, because the user's file has
    precedence.
    """
    given = Path(path)
    kind: Kind | None = next((k for k in ("callbacks", "recipes") if given.parent == Path(k)), None)
    if kind is None or given.is_file():
        return None
    file = folder(kind) / given.name
    return file if file.is_file() else None


def find(kind: Kind, name: str) -> Path:
    """Return the path of a user's file or of a packaged file.

    For a packaged recipe, ``name`` may be "quickstart" or "recipes/quickstart.yaml".

    Raises:
        EditError: neither a user's file nor a packaged file has this name.
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
