"""Only complete and unchanged delta files are read. Files that were cut short, changed or are no deltas are refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from delta.tiny import equal_bits
from fuzz.mutations import mutated
from safetensors.torch import load_file, save_file

from kedit_train import EditDelta, EditError
from kedit_train.delta import delta_file
from kedit_train.safetensors_file import checksum
from kedit_train.safetensors_header import read_header

TESTS = Path(__file__).resolve().parents[1]


def small(seed: int = 0) -> tuple[EditDelta, dict[str, torch.Tensor]]:
    """A delta with every layout, and the edited weights."""
    torch.manual_seed(seed)
    base = {
        "a.weight": torch.randn(4, 6),
        "b": torch.randn(5, 3).bfloat16(),
        "c": torch.randn(9),
        "d": torch.randn(6, 4),
    }
    edited = {name: value.clone() for name, value in base.items()}
    edited["a.weight"][:, 2] += 1
    edited["b"] += 1
    edited["c"][4] += 1
    edited["d"][[1, 5]] += 1
    return EditDelta.between(base, edited, scores={"edit/reliability": 0.5}), edited


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


def resealed(tmp_path: Path, change: Any) -> Path:
    """A changed file whose checksum was computed again."""
    delta, _ = small()
    path = delta.save(tmp_path / "edit.safetensors")
    tensors = load_file(path)
    text = json.loads(read_header(path)[1]["kedit_train.delta"])
    change(text, tensors)
    written = json.dumps(text)
    metadata = {"kedit_train.delta": written, "kedit_train.delta.sha256": checksum(written, tensors)}
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text, tensors: text.update(format=2),
            "the file has format 2, but this version of kedit-train reads format 1",
        ),
        (lambda text, tensors: text["tensors"]["c"].update(shape=[10**12]), None),
        (
            lambda text, tensors: text["tensors"]["c"].update(shape=[3]),
            "'c': the index of the entries must be in ascending order",
        ),
        (
            lambda text, tensors: text["tensors"]["b"].update(shape=[3, 5]),
            r"'b': the values before and after the edit must have shape .* got torch.bfloat16 \[5, 3\]",
        ),
        (lambda text, tensors: text["tensors"]["d"].update(layout="diagonal"), "'d': layout must be .* got 'diagonal'"),
        (lambda text, tensors: text["tensors"]["d"].update(base="0"), "'d': the hash of the base tensor must be"),
        (lambda text, tensors: text["tensors"].pop("d"), "the metadata does not mention tensor '.*/d'"),
        (lambda text, tensors: tensors.update({"index/d": tensors["index/d"].flip(0).contiguous()}), "ascending"),
        (
            lambda text, tensors: tensors.update({"index/d": tensors["index/d"].float()}),
            "must be a one-dimensional tensor of integers",
        ),
        (
            lambda text, tensors: tensors.update({"after/b": tensors["after/b"].float()}),
            "'b': the values before and after the edit must have",
        ),
        (lambda text, tensors: text.pop("base"), "KeyError: 'base'"),
        (
            lambda text, tensors: text.update(base={"fingerprint": 1, "names": []}),
            '"base" must have a fingerprint',
        ),
        (
            lambda text, tensors: text["tensors"]["c"].update(shape=[10**10, 10**10]),
            "'c': the shape must be a list of",
        ),
        (lambda text, tensors: text["tensors"]["c"].update(shape=[1] * 65), "'c': the shape must be a list of"),
        (lambda text, tensors: without_entries(tensors, "d"), "'d': the change must contain at least one value"),
        (lambda text, tensors: text.update(edits=[1]), "not a valid delta: AttributeError"),
        (lambda text, tensors: text.update(edits={"count": "many"}), '"edits" .* the hash must be a string'),
        (lambda text, tensors: text.update(edits={"count": 1, "parents": 5}), '"edits" .* the hash must be a string'),
        (
            lambda text, tensors: text.update(edits={"count": 1, "parents": [{"hash": 1}]}),
            '"edits" .* the hash must be a string',
        ),
        (
            lambda text, tensors: text["base"].update(license={"a": 1}),
            "the name and the license of the base model must be",
        ),
        (lambda text, tensors: text.update(scores={"a": "b"}), "every score must be a finite number"),
        (lambda text, tensors: text.update(scores={"a": float("nan")}), "every score must be a finite number"),
        (lambda text, tensors: text.update(scores=[1]), "not a valid delta: AttributeError"),
        (lambda text, tensors: text.update(versions={"torch": 2}), '"versions" must contain only strings'),
        (lambda text, tensors: text.update(configuration=[float("inf")]), "not a valid delta: ValueError"),
    ],
)
def test_a_file_with_a_right_checksum_and_wrong_content_is_refused(change, message, tmp_path):
    path = resealed(tmp_path, change)
    if message is None:
        # A delta of one entry of a huge tensor is valid, and no memory is allocated for the whole tensor.
        delta, edited = small()
        base = delta.revert(edited)
        with pytest.raises(EditError, match=r"c is float32 \[9\] in the model and float32 \[1000000000000\]"):
            EditDelta.load(path).apply(base)
        return
    with pytest.raises(EditError, match=message):
        EditDelta.load(path)


def test_files_with_the_older_key_for_the_license_are_read(tmp_path):
    path = resealed(tmp_path, lambda text, tensors: text["base"].update(licence=text["base"].pop("license") or "mit"))
    delta = EditDelta.load(path)
    assert delta.meta["base"]["license"] == "mit"
    assert "licence" not in delta.meta["base"]


def without_entries(tensors: dict[str, torch.Tensor], name: str) -> None:
    for part, dim in (("index", 0), ("before", 0), ("after", 0)):
        tensors[f"{part}/{name}"] = tensors[f"{part}/{name}"].narrow(dim, 0, 0).contiguous()


def test_shapes_that_no_tensor_can_have_are_refused_at_once(tmp_path):
    """This holds also for tensors without any bytes, whose shape cannot be checked against the size of the file."""
    path = tmp_path / "edit.safetensors"
    for shape in ([0, 10**20], [0, 2**40, 2**40], [0] * 65, [10**18] * 1_000_000):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        text = {"kedit_train.delta": "{}", "kedit_train.delta.sha256": "0" * 64}
        header = json.dumps({"__metadata__": text, "before/w": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(EditError, match="a tensor has an impossible shape or byte range"):
            EditDelta.load(path)


def test_arithmetic_on_a_tensor_that_does_not_fit_into_memory_is_refused(tmp_path):
    path = resealed(tmp_path, lambda text, tensors: text["tensors"]["c"].update(shape=[2**60]))
    with pytest.raises(EditError, match=r"a tensor of shape \[1152921504606846976\] and dtype torch.* does not fit"):
        EditDelta.load(path).vector()


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


def test_nested_and_huge_values_are_refused_in_one_line(tmp_path):
    deep: list[Any] = []
    for _ in range(600):
        deep = [deep]
    for change in (
        lambda text, tensors: text.update(configuration=deep),
        lambda text, tensors: text["edits"].update(count=10**4000),
        lambda text, tensors: text.update(scores={"a": 10**400}),
    ):
        with pytest.raises(EditError, match=r"edit.safetensors is damaged: the metadata") as error:
            EditDelta.load(resealed(tmp_path, change))
        assert "\n" not in str(error.value)
    delta, _ = small()
    for wrong in ({"configuration": deep}, {"scores": {"a": 10**400}}):
        with pytest.raises(EditError, match="metadata"):
            EditDelta(delta.changes, meta=delta.meta | wrong).save(tmp_path / "new.safetensors")


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
