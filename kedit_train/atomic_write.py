"""Files and folders that are there whole or not at all, also when the process is killed while it writes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DAY = 86400


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name in a hidden folder beside ``path``; what lies there in the end is flushed and takes the name.

    In one step, in place of a file that had it. After an error nothing is left; after a kill, the hidden folder, which
    the next one to write the same name removes, with the temporary files of the library that was writing (safetensors
    makes such, under names of its own). Parent folders are made.

    Example:
        >>> with writing("scores.json") as unfinished:
        ...     unfinished.write_text("{}")

    Args:
        path: of a file; or of a folder that is not there yet (make it at the name that is given).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    hidden = unfinished_name(path)
    _remove(hidden)
    hidden.mkdir()
    unfinished = hidden / path.name
    try:
        yield unfinished
        # safetensors makes files that their owner alone may read: give them what any new file has, as the folder tells.
        usual = hidden.stat().st_mode & 0o666
        for one in (*unfinished.rglob("*"), unfinished):
            if one.is_file() and not one.is_symlink():
                one.chmod(usual)
            flush(one)
        os.replace(unfinished, path)
        flush(path.parent)
    finally:
        _remove(hidden)


def obstacle(path: str | os.PathLike[str]) -> str | None:
    """Why no file can be written to ``path``, or None; nothing is made, not even its folders."""
    if os.path.isdir(path):
        return f"{path} is a folder"
    folder = Path(os.path.abspath(path)).parent
    # A link that leads nowhere is there too, and no folder can be made in its place.
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is no folder"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} may not be written to"


def unfinished_name(path: Path) -> Path:
    """``.NAME.HOST.PROCESS.unfinished`` beside ``path``."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.unfinished")


def remove_leftovers(path: Path) -> None:
    """Remove what writers that were killed have left beside ``path``.

    Of this name where the writer ran on this host and does so no more; of any name after a day without a change, unless
    a process of this host with the writer's number is running.
    """
    for other in path.parent.glob(".*.unfinished"):
        match = re.fullmatch(r"\.(.+)\.(\d+)\.unfinished", other.name)
        if match is None:
            continue
        # A file's name and a host's may have dots in them, so they are not told apart but compared.
        here = match[1].endswith(f".{socket.gethostname()}")
        if here and _runs(int(match[2])):
            continue
        same = match[1] == f"{path.name}.{socket.gethostname()}"
        try:
            if same or time.time() - other.stat().st_mtime > _DAY:
                _remove(other)
        except OSError:
            # Another process was quicker, or the folder may only be read.
            continue


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before anything that relies on them."""
    if os.name != "posix" and path.is_dir():
        return  # there, folders cannot be opened
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if os.name != "posix":
        # There, signal 0 would end it.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
