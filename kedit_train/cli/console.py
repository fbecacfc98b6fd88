"""Error messages of the commands: one line, in red, on standard error."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text


def print_error(message: str) -> None:
    """Print ``error: message`` once, even if several processes of one run report the same error."""
    line = Text.assemble(("error: ", "bold red"), plain(" ".join(message.split())))
    shared = _shared_file(message) if "RANK" in os.environ else None
    if shared is not None and not _create(shared):
        # The launcher ends all processes when the first process fails. This process therefore waits until another
        # process has printed the error.
        waited = 0.0
        while waited < 10.0 and not shared.stat().st_size:
            time.sleep(0.1)
            waited += 0.1
        return
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)
    sys.stderr.flush()
    if shared is not None:
        shared.write_text("printed")


@contextmanager
def ending_interrupts() -> Iterator[None]:
    """Context manager in which ^C ends the process with one line and the exit code 130.

    A command imports its modules inside this context manager, so that ^C has the same effect during a slow import.
    """
    try:
        yield
    except KeyboardInterrupt:
        print_error("interrupted")
        leave(130)


def plain(text: str) -> str:
    """Escape control characters in text that comes from a file, so that a terminal does not execute them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def leave(code: int) -> NoReturn:
    """End this process after a failure, without waiting for the other processes of a distributed run."""
    # A process that is interrupted during its imports must not import torch now.
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        # The threads of Gloo may abort a process that exits without shutting down its process group. A shutdown would
        # need all processes. os._exit therefore ends this process at once, with its threads.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _shared_file(message: str) -> Path:
    """Return the path of a marker file for a message. The path is the same in all processes of one launcher."""
    run = f"{os.getppid()} {os.environ.get('MASTER_PORT')} {message}"
    return Path(tempfile.gettempdir()) / f"kedit-error-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def _create(path: Path) -> bool:
    """Create the file and return True, or return False if another process has created the file."""
    try:
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return False
    return True
