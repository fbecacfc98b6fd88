"""Helpers for tests with several processes: a script is started once per rank and connects over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parent


def started(script: Path, folder: Path, rank: int, size: int) -> subprocess.Popen[str]:
    """Start ``script FOLDER RANK SIZE`` in its own process, with one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [sys.executable, str(script), str(folder), str(rank), str(size)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@contextmanager
def joined(folder: Path, rank: int, size: int) -> Iterator[None]:
    """Connect the processes for the block. With more than one process, end the process after it."""
    if size > 1:
        init = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init, timedelta(seconds=60), rank=rank, world_size=size)
    torch.set_num_threads(1)
    yield
    if size > 1:
        dist.barrier()
        # Gloo may abort the process during an ordinary exit, after the work is done.
        os._exit(0)


def close(actual: Any, expected: Any, rel: float, abs: float, path: str = "") -> None:
    """Assert that two nested dicts are equal, floats within the tolerances, because batches of other sizes round."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for name in expected:
            close(actual[name], expected[name], rel, abs, f"{path}/{name}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=rel, abs=abs), path
    else:
        assert actual == expected, path
