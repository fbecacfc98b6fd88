"""HiddenStateStore returns what was added bit for bit, from memory and from disk, and counts what does not fit."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kedit_train.core.cache import hidden_state_store
from kedit_train.core.cache.hidden_state_store import HiddenStateStore, parse_bytes
from kedit_train.errors import EditError


def states(n: int, dtype: torch.dtype = torch.float32, first: int = 0) -> dict[str, torch.Tensor]:
    """Hidden states of n sequences with 1 to n tokens of 4 dimensions."""
    return {f"k{first + i}": torch.randn(i + 1, 4).to(dtype) for i in range(n)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_limit", [1, 100, 10**6])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, memory_limit: int) -> None:
    store, added = HiddenStateStore(memory_limit, tmp_path), states(6, dtype)
    added["k0"][0, 0] = -0.0
    store.add(added)
    store.add(states(3, dtype, first=6))
    assert len(store) == 9
    assert store.memory_bytes <= memory_limit
    stored = store.get(list(added)[::-1])
    assert stored is not None
    assert all(same(a, b) for a, b in zip(stored, reversed(added.values()), strict=True))
    assert store.get(["k0", "unknown"]) is None
    assert list(tmp_path.rglob("*.part")) == []


def test_sequences_beyond_the_memory_limit_are_left_out_and_counted() -> None:
    store, added = HiddenStateStore(16 * (1 + 2 + 3), None), states(5)
    store.add(added)
    assert (store.memory_bytes, store.disk_bytes, store.left_out, len(store)) == (96, 0, 2, 3)
    store.add(added)
    assert (store.memory_bytes, len(store)) == (96, 3)
    assert store.get(["k0", "k3"]) is None
    store.clear()
    assert (store.memory_bytes, store.left_out, len(store)) == (0, 0, 0)


def test_stored_hidden_states_are_copies_and_not_views_of_their_batch() -> None:
    store, batch = HiddenStateStore(10**6), torch.ones(3, 4)
    store.add({"k": batch[1:]})
    batch.zero_()
    (stored,) = store.get(["k"]) or []
    assert stored.sum() == 8
    assert stored.untyped_storage().nbytes() == 2 * 4 * 4


def test_two_stores_share_a_directory_and_leave_nothing_in_it(tmp_path: Path) -> None:
    stores = [HiddenStateStore(1, tmp_path / "new") for _ in range(2)]
    added = [states(3), states(3)]
    for store, hidden_states in zip(stores, added, strict=True):
        store.add(hidden_states)
    assert all(store.disk_bytes > 0 for store in stores)
    stores[0].close()
    stored = stores[1].get(["k0", "k2"])
    assert stored is not None
    assert same(stored[1], added[1]["k2"])
    del stores, store
    assert list((tmp_path / "new").iterdir()) == []


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from kedit_train.core.cache.hidden_state_store import HiddenStateStore
store = HiddenStateStore(1, Path(sys.argv[1]))
store.add({"k": torch.ones(3, 4)})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL exists on POSIX only")
def test_the_next_store_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    live = HiddenStateStore(1, tmp_path)
    live.add(states(2))
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    foreign = tmp_path / "prefix-cache-of-an-older-version"
    foreign.mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    # A run that is resumed at its end writes nothing into its store.
    store = HiddenStateStore(1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    store.add(states(2))
    assert len(list(tmp_path.iterdir())) == 3
    assert live.get(["k0", "k1"]) is not None
    # Nobody has used this directory for a day.
    os.utime(foreign, (0, 0))
    store.clear()
    store.add(states(2))
    assert not foreign.exists()
    assert live.get(["k0", "k1"]) is not None


@pytest.mark.skipif(os.name != "posix", reason="process ids are checked on POSIX only")
def test_reading_keeps_the_directory_from_looking_abandoned(tmp_path: Path) -> None:
    """A store may read for days without writing, and other containers see only the age of its directory."""
    store = HiddenStateStore(1, tmp_path)
    store.add(states(2))
    (directory,) = tmp_path.iterdir()
    os.utime(directory, (0, 0))
    store._touched = 0.0
    store.get(["k0"])
    assert directory.stat().st_mtime > 1e9


def test_a_full_disk_gives_one_warning_and_no_partial_file_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    store = HiddenStateStore(1, tmp_path)
    store.add(states(2))

    def fail(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hidden_state_store, "save_file", fail)
    with pytest.warns(UserWarning, match=r"^no more hidden states are written to .*No space left on device"):
        store.add(states(2, first=2))
    store.add(states(2, first=4))
    assert len(store) == 2
    assert store.left_out == 4
    assert store.get(["k0", "k1"]) is not None
    assert store.get(["k2"]) is None


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("7", 7), ("1GB", 10**9), ("1.5 GiB", 3 * 2**29), ("200kb", 200_000), ("2 B", 2), ("1TB", 10**12)],
)
def test_a_size_with_a_unit_is_a_number_of_bytes(size: Any, count: int) -> None:
    assert parse_bytes(size) == count


@pytest.mark.parametrize("size", [0, -1, "0GB", "1G", "GB", "1 parsec", "", None, "1e9"])
def test_an_invalid_size_is_an_error(size: Any) -> None:
    with pytest.raises(
        EditError, match=r"^X: memory_limit must be a number of bytes above 0 or a size such as '1.5GiB', got"
    ):
        parse_bytes(size, "X")
