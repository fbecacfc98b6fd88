"""Name temporary folders after the process that owns them, and find the folders whose owner has ended."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path

_DAY = 86400
# The names of the folders that this process owns. If a name contains the id of this process but is not listed here,
# then an earlier process with the same id left the folder behind. This can happen in a container that was restarted.
_owned: set[str] = set()
_numbers = itertools.count()


def claim(folder: Path, start: str, end: str = "") -> Path:
    """Return the path of a new temporary folder that this process owns. The folder is not created.

    The name of the folder contains the process id, so that other processes can find out whether the owner is running.
    After a restart of the machine, or in another container, another process can have the same id. Therefore, the name
    also contains the host name and a hash of the boot id and the PID namespace. A counter makes every name different,
    so threads never share a folder.

    Args:
        folder: the parent of the temporary folder.
        start: the first part of the name.
        end: the last part of the name, such as ".unfinished".
    """
    path = folder / f"{start}.{_place()}.{os.getpid()}.{next(_numbers)}{end}"
    _owned.add(path.name)
    return path


def release(path: Path) -> None:
    """Record that this process no longer owns a folder that :func:`claim` returned."""
    _owned.discard(path.name)


def has_ended(name: str) -> bool | None:
    """Return whether the owner of a temporary folder has ended, or None if this is unknown.

    Args:
        name: the name of the folder.
    """
    match = re.search(r"\.(.+)\.(\d+)\.\d+(?:\.[a-z]+)?$", name)
    if os.name != "posix" or match is None or not f".{match[1]}".endswith(f".{_place()}"):
        return None  # On Windows, signal 0 would end the process.
    if int(match[2]) == os.getpid():
        return name not in _owned
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def remove_abandoned(folders: Iterable[Path], *, at_once: str = "") -> None:
    """Remove temporary folders whose owner has ended.

    - If the owner is running, the folder is kept.
    - If the owner has ended, a folder whose name begins with ``at_once`` is removed immediately. Any other folder is
      removed only after it has not changed for a day.
    - If it is unknown whether the owner is running, the folder is removed only after it has not changed for a day. This
      is the case for folders from another container, another host or an older version of this package.

    Args:
        folders: the temporary folders.
        at_once: a prefix of folder names. The default "" matches every name.
    """
    for folder in folders:
        ended = has_ended(folder.name)
        if ended is False:
            continue
        try:
            if (ended and folder.name.startswith(at_once)) or time.time() - folder.stat().st_mtime > _DAY:
                remove(folder)
        except OSError:
            # Another process has removed the folder, or the folder is read-only.
            continue


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@functools.cache
def _place() -> str:
    """Return the host name and a hash of the boot id and the PID namespace.

    A process id is valid only until the machine is restarted and only inside one PID namespace.
    """
    parts = [socket.gethostname()]
    # Only Linux has these files. On other systems, the host name alone is used.
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return f"{parts[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
