"""Delta files are saved and loaded without loss. Truncated or changed files, and other files, are errors."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from delta.small_delta import small
from delta.tiny import equal_bits
from fuzz.mutations import mutated
from safetensors.torch import load_file

from kedit_train import EditDelta, EditError
from kedit_train.delta import delta_file

TESTS = Path(__file__).resolve().parents[1]


def same(one: EditDelta, other: EditDelta) -> bool:
    def parts(delta: EditDelta) -> dict[str, torch.Tensor]:
        return {f"{kind} {n}": getattr(c, kind) for n, c in delta.changes.items() for kind in ("before", "after")}

    places = [{n: (c.layout, c.shape, c.base, c.tied) for n, c in delta.changes.items()} for delta in (one, other)]
    numbers = [[c.index.tolist() for c in delta.changes.values() if c.index is not None] for delta in (one, other)]
    metas = [{k: v for k, v in delta.meta.items() if k != "format"} for delta in (one, other)]
    return equal_bits(parts(one), parts(other)) and all(a == b for a, b in (places, numbers, metas))


def test_a_saved_delta_can_be_loaded_and_saved_again(tmp_path):
    delta, _ = small()
    assert {change.layout for change in delta.changes.values()} == {"dense", "rows", "columns", "entries"}
    again = EditDelta.load(delta.save(tmp_path / "one.safetensors"))
    assert same(delta, again)
    again.save(tmp_path / "two.safetensors")
    # A delta can also be saved over the file from which its tensors are mapped.
    again.save(tmp_path / "one.safetensors")
    for name in ("one", "two"):
        assert same(delta, EditDelta.load(tmp_path / f"{name}.safetensors"))
    # Any safetensors reader can open the file.
    assert set(load_file(tmp_path / "one.safetensors")) > {"before/b", "after/b", "index/c"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("files", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_equal(tmp_path, files):
    delta, _ = small()
    content = delta.save(tmp_path / "edit.safetensors").read_bytes()
    draw, path = random.Random(0), tmp_path / "mutated.safetensors"
    messages, equal = [], 0
    for _ in range(files):
        path.write_bytes(mutated(content, "kedit_train.delta", draw, reseal=False))
        try:
            loaded = EditDelta.load(path)
        except EditError as error:
            messages.append(str(error))
        else:
            assert same(loaded, delta)
            equal += 1
    # Some mutations change nothing, for example a zero replaced by a zero.
    assert len(messages) > 0.9 * files
    assert [message for message in messages if "\n" in message] == []
    assert equal < 0.1 * files


def test_metadata_that_load_would_refuse_is_not_saved(tmp_path):
    delta, _ = small()
    for wrong in ({"scores": {"a": True}}, {"edits": None}, {"base": {}}):
        with pytest.raises(EditError, match=r"metadata of the delta is not valid|every score must be a finite number"):
            EditDelta(delta.changes, meta=delta.meta | wrong).save(tmp_path / "edit.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_missing_edits_count_as_none(tmp_path):
    delta, _ = small()
    del delta.meta["edits"]
    loaded = EditDelta.load(delta.save(tmp_path / "edit.safetensors"))
    assert (2 * loaded).delta().meta["edits"]["count"] == 0


def test_foreign_files_are_refused(tmp_path, factlm):
    (tmp_path / "text.safetensors").write_text("not at all")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.safetensors")
    for path, message in [
        (tmp_path / "text.safetensors", "not a safetensors file, or is cut short"),
        (tmp_path / "empty.safetensors", "not a safetensors file, or is cut short"),
        (tmp_path / "pickle.safetensors", "not a safetensors file, or is cut short"),
        (factlm / "model.safetensors", "is not a delta file"),
        (tmp_path / "missing.safetensors", "does not exist"),
        (tmp_path, "is a folder; give the path of a file"),
        ("a\0b", "does not exist|cannot be read"),
    ]:
        with pytest.raises(EditError, match=message):
            EditDelta.load(path)


def test_metadata_that_does_not_fit_json_is_refused_and_leaves_nothing(tmp_path):
    delta, _ = small()
    delta.meta["configuration"] = {"model": object()}
    with pytest.raises(EditError, match="metadata of the delta is not valid"):
        delta.save(tmp_path / "edit.safetensors")
    delta.meta["configuration"] = {"score": float("nan")}
    with pytest.raises(EditError, match="metadata of the delta is not valid"):
        delta.save(tmp_path / "edit.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_loading_takes_no_memory_for_tensors(tmp_path):
    """A file of 160 MB is hashed through its memory map, so anonymous memory does not grow with it."""
    base = torch.zeros(20_000_000)
    EditDelta.between({"w": base}, {"w": base + 1}).save(tmp_path / "edit.safetensors")
    code = (
        "import sys; from kedit_train import EditDelta\n"
        "def anonymous(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])\n"
        "before = anonymous(); delta = EditDelta.load(sys.argv[1]); print(anonymous() - before, delta.nbytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "edit.safetensors")], capture_output=True, text=True, check=True
    )
    grown, size = map(int, done.stdout.split())
    assert size == 160_000_000
    assert grown * 1024 < 20_000_000


@pytest.mark.parametrize("limit", [1 << 26, 0], ids=["small", "large"])
@pytest.mark.parametrize("damage", ["overwritten", "cut short"])
def test_a_file_that_changes_after_loading_changes_no_applied_value(tmp_path, monkeypatch, limit, damage):
    monkeypatch.setattr(delta_file, "_IN_MEMORY", limit)
    delta, edited = small()
    base = delta.revert({name: value.clone() for name, value in edited.items()})
    path = delta.save(tmp_path / "edit.safetensors")
    loaded = EditDelta.load(path)
    with path.open("rb+") as file:
        if damage == "overwritten":
            file.write(b"\x07" * path.stat().st_size)
        else:
            file.truncate(100)
    assert same(loaded, delta)
    assert equal_bits(loaded.apply(base), edited)


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_during_a_save_leave_no_wrong_file(tmp_path, kills):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "delta.killed_saves", str(tmp_path), str(kills)],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["killed"] == kills
    assert found["wrong"] == 0
    # Some kills interrupted a save, and unfinished files are recognized.
    assert found["unfinished"] >= kills // 20
    assert found["refused"] >= kills // 200
    assert found["loaded"] == kills
    assert found["left"] == 0
