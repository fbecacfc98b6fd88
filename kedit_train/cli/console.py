"""How a command speaks when something is wrong: one line, in red, on standard error."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text


def say_error(message: str) -> None:
    """Print ``error: message`` once, although every process of a distributed run may have the same to say."""
    line = Text.assemble(("error: ", "bold red"), plain(" ".join(message.split())))
    said = _word_of(message) if "RANK" in os.environ else None
    if said is not None and not _take(said):
        # The launcher ends all processes when the first one fails: not before the other has said it.
        waited = 0.0
        while waited < 10.0 and not said.stat().st_size:
            time.sleep(0.1)
            waited += 0.1
        return
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)
    sys.stderr.flush()
    if said is not None:
        said.write_text("said")


def plain(text: str) -> str:
    """Text out of a file with its control characters escaped: a terminal would obey them."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _word_of(message: str) -> Path:
    """A file that the processes of one launcher share for what they have to say."""
    run = f"{os.getppid()} {os.environ.get('MASTER_PORT')} {message}"
    return Path(tempfile.gettempdir()) / f"kedit-said-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def _take(path: Path) -> bool:
    """Make the file; only one process can."""
    try:
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return False
    return True


def leave(code: int) -> NoReturn:
    """End a process that failed, without waiting for the others of a distributed run."""
    from kedit_train.core.processes import has_process_group

    if has_process_group():
        # Gloo's threads abort the process in some one in three ordinary exits without a common shutdown, which the
        # other processes can no longer take part in.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
