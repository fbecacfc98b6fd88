"""Runs that are killed at any moment continue in a new process, and end bit for bit like uninterrupted ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conformance import killed_runs, kills

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forking a process that uses torch is safe only on Linux"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Newer Pythons warn about a fork in a process with threads. The child processes use no thread of their parent.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]
HOSTS = list(killed_runs.RUNS)


@pytest.fixture(autouse=True)
def one_thread():
    """A forked child that uses several threads of OpenMP waits forever if its parent has used them before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("host", [h if h == "Trainer" else pytest.param(h, marks=pytest.mark.slow) for h in HOSTS])
def test_a_kill_at_each_kind_of_boundary_loses_nothing(host: str, tmp_path: Path) -> None:
    matrix = kills.Matrix(host, tmp_path)
    names = [boundary.split(":")[0] for boundary in matrix.boundaries]
    # The last boundary of each kind: the last checkpoint, its state, and the delta. By then, the cache has been
    # removed.
    last = {
        name: len(names) - 1 - names[::-1].index(name) for name in ("checkpoint", "state", "delta") if name in names
    }
    for boundary in last.values():
        matrix.check(boundary)


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_a_kill_at_any_boundary_loses_nothing(host: str, tmp_path: Path) -> None:
    matrix = kills.Matrix(host, tmp_path)
    assert {b.split(":")[0] for b in matrix.boundaries} >= {"step", "checkpoint", "delta", "end"}
    for boundary in range(len(matrix.boundaries)):
        matrix.check(boundary)


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    assert kills.random_kills(tmp_path, HOSTS, 30, seed=1)["failures"] == []


def test_every_trainer_of_the_conformance_tests_is_killed() -> None:
    from conformance.hosts import HOSTS as ALL

    assert set(ALL) <= set(killed_runs.RUNS)
