"""Write files and folders atomically: completely or not at all, even if the process is killed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kedit_train.errors import EditError
from kedit_train.owners import claim, release, remove, remove_abandoned
from kedit_train.paths import check_path


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file or a folder atomically: the ``with`` block writes to a temporary path, which is then renamed.

    The temporary path is in a hidden folder next to ``path``. When the block ends, all data is flushed to disk, and the
    temporary path is renamed to ``path`` in one step. An existing file is replaced. Parent folders are created.

    If the block raises an error, the hidden folder is removed. If the process is killed, the hidden folder remains. The
    next call for the same path in the same container removes this folder. In another container, a call removes the
    folder only after a day without changes.

    Several threads and processes may write the same path. Each call writes a complete file. In the end, ``path``
    contains the file of the call that ended last.

    Args:
        path: the file to write, or the folder to write. A folder must not exist yet. The block must create the file
            or the folder at the temporary path.

    Yields:
        The temporary path to write to.

    Raises:
        EditError: the path is empty or contains a NUL character.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with writing(f"{folder.name}/scores.json") as unfinished:
        ...     _ = unfinished.write_text("{}")
        >>> os.listdir(folder.name)
        ['scores.json']
    """
    check_path(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    hidden = unfinished_name(path)
    unfinished = hidden / path.name
    try:
        remove(hidden)
        hidden.mkdir()
        yield unfinished
        # Safetensors creates files that only their owner can read. Here, these files get the default permissions of new
        # files, which follow from the permissions of the new hidden folder.
        permissions = hidden.stat().st_mode & 0o666
        for entry in (*unfinished.rglob("*"), unfinished):
            if entry.is_file() and not entry.is_symlink():
                entry.chmod(permissions)
            flush(entry)
        os.replace(unfinished, path)
        flush(path.parent)
    finally:
        remove(hidden)
        release(hidden)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written to ``path``, without creating anything.

    Call this function before a long computation that writes its result to the file.

    Raises:
        EditError: ``path`` contains a NUL character or is a folder, or the folder of ``path`` cannot be created or
            written to.

    Example:
        >>> check_writable("/dev/null/a")
        Traceback (most recent call last):
        ...
        kedit_train.errors.EditError: /dev/null/a cannot be written, because /dev/null is not a folder; change the path.
    """
    check_path(path)
    if os.path.isdir(path):
        raise EditError(f"{path} cannot be written, because it is a folder; give the path of a file.")
    folder = Path(os.path.abspath(path)).parent
    # A broken link counts as existing, because no folder can be made in its place.
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise EditError(f"{path} cannot be written, because {folder} is not a folder; change the path.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EditError(f"{path} cannot be written, because {folder} is not writable; use another path.")


def unfinished_name(path: Path) -> Path:
    """Return an unused path for a hidden folder next to ``path``. The folder is for the unfinished file.

    The name is ``.NAME.HOST-HASH.PROCESS.NUMBER.unfinished``, where NAME is the last part of ``path``. For the other
    parts, see :func:`kedit_train.owners.claim`. This function does not create the folder.
    """
    return claim(path.parent, f".{path.name}", ".unfinished")


def remove_leftovers(path: Path) -> None:
    """Remove the hidden folders next to ``path`` that killed processes left behind.

    If a process in this container was killed while it wrote ``path``, the hidden folder of this process is removed at
    once. For all other hidden folders, the rules of :func:`kedit_train.owners.remove_abandoned` apply.
    """
    hidden = [other for other in path.parent.glob(".*.unfinished") if re.search(r"\.\d+\.unfinished$", other.name)]
    remove_abandoned(hidden, at_once=f".{path.name}.")


def flush(path: Path) -> None:
    """Flush the bytes of a file, or the names in a folder, to disk."""
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open folders.
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
