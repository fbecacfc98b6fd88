"""How a command speaks when something is wrong: one line, in red, on standard error."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from rich.console import Console
from rich.text import Text


def say_error(message: str) -> None:
    """Print ``error: message`` once, although every process of a distributed run may have the same to say."""
    if int(os.environ.get("RANK", "0")) > 0:
        # The launcher ends all processes when the first one fails, so this is heard only if rank 0 has not failed.
        time.sleep(3)
    line = Text.assemble(("error: ", "bold red"), " ".join(message.split()))
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)


def leave(code: int) -> NoReturn:
    """End a process that failed, without waiting for the others of a distributed run."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        # Gloo's threads abort the process in some one in three ordinary exits without a common shutdown, which the
        # other processes can no longer take part in.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
