"""A script that kills child processes while they save deltas, and loads what they leave."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kedit_train import EditDelta, EditError


def make(value: float) -> EditDelta:
    base = torch.zeros(300_000)
    return EditDelta.between({"w": base}, {"w": base + value})


def is_right(path: Path) -> bool | None:
    """Return whether a file loads as one of the two deltas; None if it is refused."""
    try:
        change = EditDelta.load(path).changes["w"]
    except EditError:
        return None
    return any(bool((change.after == value).all()) for value in (1.0, 2.0)) and not bool(change.before.any())


def stop_during_a_save(child: int, is_saving: Callable[[], bool]) -> None:
    """Stop a process while an unfinished file exists."""
    while True:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        if is_saving():
            return
        os.kill(child, signal.SIGCONT)
        time.sleep(0.0001)


def main(folder: Path, kills: int) -> None:
    deltas, draw, path = [make(1.0), make(2.0)], random.Random(0), folder / "edit.safetensors"
    found = {"killed": 0, "wrong": 0, "unfinished": 0, "refused": 0, "loaded": 0}
    seen: set[Path] = set()
    deltas[0].save(path)
    for number in range(kills):
        child = os.fork()
        if child == 0:
            while True:
                for delta in deltas:
                    delta.save(path)
        # On a busy machine, the child may not get far in this time, so every second kill is during a save.
        time.sleep(0.001 + 0.02 * draw.random())
        if number % 2:
            stop_during_a_save(child, lambda: any(file != path and file not in seen for file in folder.rglob("*")))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found["killed"] += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        for file in [one for one in folder.rglob("*") if one.is_file() and one not in seen]:
            state = is_right(file)
            found["wrong"] += state is False
            if file != path:
                # The file stays, because the next save must remove it.
                seen.add(file)
                found["unfinished"] += 1
                found["refused"] += state is None
            else:
                # The path itself must hold a complete file at every moment.
                found["wrong"] += state is None
                found["loaded"] += state is True
    deltas[0].save(path)
    found["left"] = len(list(folder.iterdir())) - 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
