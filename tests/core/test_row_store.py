"""RowStore: what was put in comes out bit for bit, from memory and from disk; what fits nowhere is told."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from kedit_train.core.cache import hidden_state_store as row_store
from kedit_train.core.cache.hidden_state_store import RowStore, parse_bytes
from kedit_train.errors import EditError


def rows(n: int, dtype: torch.dtype = torch.float32, first: int = 0) -> dict[str, torch.Tensor]:
    return {f"k{first + i}": torch.randn(i + 1, 4).to(dtype) for i in range(n)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory", [1, 100, 10**6])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, memory: int) -> None:
    store, given = RowStore(memory, tmp_path), rows(6, dtype)
    given["k0"][0, 0] = -0.0
    store.add(given)
    store.add(rows(3, dtype, first=6))
    assert len(store) == 9
    assert store.memory_bytes <= memory
    got = store.get(list(given)[::-1])
    assert got is not None
    assert all(same(a, b) for a, b in zip(got, reversed(given.values()), strict=True))
    assert store.get(["k0", "unknown"]) is None
    assert list(tmp_path.rglob("*.part")) == []


def test_memory_is_counted_and_what_is_beyond_it_is_left_out() -> None:
    store, given = RowStore(16 * (1 + 2 + 3), None), rows(5)
    store.add(given)
    assert (store.memory_bytes, store.disk_bytes, store.left_out, len(store)) == (96, 0, 2, 3)
    store.add(given)
    assert (store.memory_bytes, len(store)) == (96, 3)
    assert store.get(["k0", "k3"]) is None
    store.clear()
    assert (store.memory_bytes, store.left_out, len(store)) == (0, 0, 0)


def test_a_row_is_a_copy_and_not_a_view_of_its_batch() -> None:
    store, batch = RowStore(10**6), torch.ones(3, 4)
    store.add({"k": batch[1:]})
    batch.zero_()
    (row,) = store.get(["k"]) or []
    assert row.sum() == 8
    assert row.untyped_storage().nbytes() == 2 * 4 * 4


def test_two_stores_share_a_folder_and_leave_nothing_in_it(tmp_path: Path) -> None:
    stores = [RowStore(1, tmp_path / "new") for _ in range(2)]
    given = [rows(3), rows(3)]
    for store, these in zip(stores, given, strict=True):
        store.add(these)
    assert all(store.disk_bytes > 0 for store in stores)
    stores[0].close()
    got = stores[1].get(["k0", "k2"])
    assert got is not None
    assert same(got[1], given[1]["k2"])
    del stores, store
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_told_once_and_nothing_half_written_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    store = RowStore(1, tmp_path)
    store.add(rows(2))

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(row_store, "save_file", full)
    with pytest.warns(UserWarning, match="no more rows are written to .*No space left on device"):
        store.add(rows(2, first=2))
    store.add(rows(2, first=4))
    assert len(store) == 2
    assert store.left_out == 4
    assert store.get(["k0", "k1"]) is not None
    assert store.get(["k2"]) is None


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("7", 7), ("1GB", 10**9), ("1.5 GiB", 3 * 2**29), ("200kb", 200_000), ("2 B", 2), ("1TB", 10**12)],
)
def test_sizes(size: Any, count: int) -> None:
    assert parse_bytes(size) == count


@pytest.mark.parametrize("size", [0, -1, "0GB", "1G", "GB", "1 parsec", "", None, "1e9"])
def test_no_sizes(size: Any) -> None:
    with pytest.raises(EditError, match=r"^X: .* is no size above 0; write bytes"):
        parse_bytes(size)
