"""Save a gated adapter with its tokenizer in a folder.

If the folder contains an earlier gated adapter, the files of the earlier adapter are replaced. All other files stay.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import unfinished_name, writing
from kedit_train.core.gate.gate import find_gate
from kedit_train.core.gate.gate_file import GATE_FILE, has_gate, read_gate, save_gate
from kedit_train.errors import EditError
from kedit_train.owners import release, remove


def check_folder(folder: Path) -> None:
    """Check that a gated adapter can be saved in a folder, and create the parents of the folder.

    Raises:
        EditError: the path is a link or a file, the folder contains files but no gated adapter, or the folder cannot be
            created.
    """
    if folder.is_symlink():
        raise EditError(f"path={str(folder)!r} is a symbolic link; pass the folder itself.")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_gated(folder))):
        raise EditError(
            f"path={str(folder)!r} exists and is not the folder of an earlier gated adapter; choose a new folder."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise EditError(
            f"path={str(folder)!r} cannot be created, because one of its parent folders is a file; choose another "
            "folder."
        ) from error
    except OSError as error:
        raise EditError(f"path={str(folder)!r} cannot be created ({error.strerror}); choose another folder.") from error


def save_adapter(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model with a gate, and its tokenizer, in a folder.

    A new folder appears in one step, with all files. In an existing folder, each file is replaced atomically, and the
    gate is replaced last. A file of the earlier adapter is deleted if the new adapter has no file of this name. All
    other files stay. If the process is killed after some of the files were replaced, the gate does not match the
    adapter, and loading the folder raises an error.

    Args:
        model: a ``PeftModel`` with a gate.
        tokenizer: its tokenizer.
        folder: the folder.

    Raises:
        EditError: :func:`check_folder` refuses the folder, or a file cannot be written.
    """
    check_folder(folder)
    if not folder.exists():
        with writing(folder) as unfinished:
            _write(model, tokenizer, unfinished)
        return
    earlier = read_gate(folder, other_adapter=True).files if has_gate(folder) else []
    hidden = unfinished_name(folder)
    try:
        remove(hidden)
        files = _write(model, tokenizer, hidden)
        for name in {*files, *earlier}:
            _check_inside(folder, name)
        for name in [*files, GATE_FILE]:
            with writing(folder / name) as unfinished:
                os.replace(hidden / name, unfinished)
    finally:
        remove(hidden)
        release(hidden)
    for name in set(earlier) - set(files):
        (folder / name).unlink(missing_ok=True)


def remove_stale_gate(model: Any, folder: str | os.PathLike[str]) -> None:
    """Delete the gate file in ``folder`` if ``model`` has no gate. Only one process may call this function."""
    if find_gate(model) is None:
        (Path(folder) / GATE_FILE).unlink(missing_ok=True)


def _write(model: Any, tokenizer: Any, folder: Path) -> list[str]:
    """Write the adapter, the tokenizer and the gate to a new folder.

    Returns:
        The names of all written files, except the gate file. The gate file stores this list, so that a later save can
        delete these files.
    """
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files.remove(GATE_FILE)
    save_gate(find_gate(model), folder, files)
    return files


def _check_inside(folder: Path, name: str) -> None:
    """Raise an error if a file of an adapter would lie outside of its folder, for example behind a symbolic link."""
    if not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
        raise EditError(
            f"the path of the adapter file {name!r} leads out of {str(folder)!r} through a link or '..'; choose a new "
            "folder for the gated adapter."
        )


def _is_gated(folder: Path) -> bool:
    try:
        read_gate(folder, other_adapter=True)
    except EditError:
        return False
    return (folder / "adapter_config.json").is_file()
