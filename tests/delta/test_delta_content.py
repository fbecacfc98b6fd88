"""Delta files with a right checksum: wrong content is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from delta.small_delta import small
from safetensors.torch import load_file, save_file

from kedit_train import EditDelta, EditError
from kedit_train.safetensors_file import checksum
from kedit_train.safetensors_header import read_header


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
            r"'b': the values before and after the edit must have shape .* got shape \[5, 3\] and dtype torch.bfloat16",
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
        (lambda text, tensors: text.update(edits=[1]), "not a valid delta: .*AttributeError"),
        (lambda text, tensors: text.update(edits={"count": "many"}), '"edits" .* each hash must be a string'),
        (lambda text, tensors: text.update(edits={"count": 1, "parents": 5}), '"edits" .* each hash must be a string'),
        (
            lambda text, tensors: text.update(edits={"count": 1, "parents": [{"hash": 1}]}),
            '"edits" .* each hash must be a string',
        ),
        (
            lambda text, tensors: text["base"].update(license={"a": 1}),
            "the name and the license of the base model must be",
        ),
        (lambda text, tensors: text.update(scores={"a": "b"}), "every score must be a finite number"),
        (lambda text, tensors: text.update(scores={"a": float("nan")}), "every score must be a finite number"),
        (lambda text, tensors: text.update(scores=[1]), "not a valid delta: .*AttributeError"),
        (lambda text, tensors: text.update(versions={"torch": 2}), '"versions" must contain only strings'),
        (lambda text, tensors: text.update(configuration=[float("inf")]), "not a valid delta: .*ValueError"),
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
        with pytest.raises(EditError, match=r"a shape must be a list of at most 64 integers >= 0 .* got \[") as error:
            EditDelta.load(path)
        assert len(str(error.value)) < 1000


def test_arithmetic_on_a_tensor_that_does_not_fit_into_memory_is_refused(tmp_path):
    path = resealed(tmp_path, lambda text, tensors: text["tensors"]["c"].update(shape=[2**60]))
    with pytest.raises(EditError, match=r"a tensor of shape \[1152921504606846976\] and dtype torch.* does not fit"):
        EditDelta.load(path).vector()


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
