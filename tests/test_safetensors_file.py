"""Safetensors files with metadata and a checksum."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kedit_train import safetensors_file
from kedit_train.errors import EditError
from kedit_train.safetensors_file import checksum, dtype_name, fill_tensors, load_tensors, save_tensors, tensor_bytes
from kedit_train.safetensors_header import is_shape, read_header, read_tensor

KIND = "kedit_train.sample"


def example() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "mask": torch.tensor([[True, False, True]]),
        "number": torch.tensor(3),
        "empty": torch.empty(0, 4),
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("memory_map", [True, False])
def test_tensors_and_metadata_survive_a_file(tmp_path: Path, memory_map: bool) -> None:
    metadata = {"seed": 0, "names": ["a", "ß"], "nested": {"rate": 0.1, "none": None}}
    path = save_tensors(tmp_path / "new" / "a.safetensors", example(), metadata, kind=KIND)
    tensors, found = load_tensors(path, kind=KIND, memory_map=memory_map)
    assert equal(tensors, example())
    assert found == metadata
    assert equal(load_file(path), example())
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_tensors_that_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    matrix = torch.arange(12).view(3, 4)
    path = save_tensors(tmp_path / "a.safetensors", {"t": matrix.T, "part": matrix[:, 1:2]}, kind=KIND)
    assert equal(load_tensors(path, kind=KIND).tensors, {"t": matrix.T, "part": matrix[:, 1:2]})


def test_filled_tensors_are_what_saved_tensors_are(tmp_path: Path) -> None:
    values = example()
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in values.items()}
    with fill_tensors(tmp_path / "filled.safetensors", shapes, {"texts": 3}, kind=KIND) as tensors:
        assert not (tmp_path / "filled.safetensors").exists()
        for name, value in values.items():
            tensors[name].copy_(value)
    found = load_tensors(tmp_path / "filled.safetensors", kind=KIND)
    assert equal(found.tensors, values)
    assert found.metadata == {"texts": 3}
    assert equal(load_file(tmp_path / "filled.safetensors"), values)


def test_metadata_that_looks_like_the_blank_checksum_is_kept(tmp_path: Path) -> None:
    with fill_tensors(tmp_path / "a.safetensors", {"w": ((2,), torch.int32)}, ["0" * 64], kind=KIND) as tensors:
        tensors["w"].zero_()
    assert load_tensors(tmp_path / "a.safetensors", kind=KIND).metadata == ["0" * 64]


def test_an_interrupted_fill_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        fill_tensors(tmp_path / "a.safetensors", {"w": ((2,), torch.float32)}, kind=KIND),
    ):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_every_changed_byte_of_the_data_is_noticed(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", {"w": torch.arange(4, dtype=torch.uint8)}, kind=KIND)
    content = path.read_bytes()
    for place in range(len(content) - 4, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(EditError, match="was changed after it was written"):
            load_tensors(path, kind=KIND)
    path.write_bytes(content[:-1])
    with pytest.raises(EditError, match="cut short"):
        load_tensors(path, kind=KIND)


def test_a_file_of_another_kind_is_refused_unless_unsigned_files_are_allowed(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", example(), kind="kedit_train.other")
    with pytest.raises(EditError, match=r"is not a sample file"):
        load_tensors(path, kind=KIND)
    save_file(example(), tmp_path / "foreign.safetensors")
    tensors, metadata = load_tensors(tmp_path / "foreign.safetensors", kind=KIND, allow_unsigned=True)
    assert equal(tensors, example())
    assert metadata is None


def test_metadata_must_fit_json(tmp_path: Path) -> None:
    for wrong in ({"model": object()}, {"score": float("nan")}):
        with pytest.raises(EditError, match="metadata cannot be saved as JSON"):
            save_tensors(tmp_path / "a.safetensors", {}, wrong, kind=KIND)
    assert list(tmp_path.iterdir()) == []


def test_a_mapped_file_may_be_replaced_by_a_new_one(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(3)}, kind=KIND)
    old = load_tensors(path, kind=KIND).tensors["w"]
    save_tensors(path, {"w": torch.zeros(3)}, kind=KIND)
    assert old.tolist() == [1, 1, 1]
    old += 1
    assert load_tensors(path, kind=KIND).tensors["w"].tolist() == [0, 0, 0]


def test_the_checksum_depends_on_names_dtypes_and_shapes() -> None:
    value = torch.zeros(4)
    sums = {
        checksum("{}", {"a": value}),
        checksum("", {"a": value}),
        checksum("{}", {"b": value}),
        checksum("{}", {"a": value.view(2, 2)}),
        checksum("{}", {"a": value.view(torch.int32)}),
    }
    assert len(sums) == 5


def test_bytes_and_dtype_names() -> None:
    assert bytes(tensor_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)) == bytes([1, 3, 2, 4])
    assert bytes(tensor_bytes(torch.empty(0))) == b""
    assert dtype_name(torch.bfloat16) == "bfloat16"


def test_the_header_names_the_place_of_every_tensor(tmp_path: Path) -> None:
    save_file(example(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    spans, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    assert equal({name: read_tensor(tmp_path / "a.safetensors", spans[name], name) for name in spans}, example())


def test_a_dtype_that_torch_does_not_have_is_named(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    spans, _ = read_header(path)
    with pytest.raises(EditError, match="tensor 'w' has a dtype that torch does not support"):
        read_tensor(path, spans["w"], "w")


@pytest.mark.parametrize(
    ("value", "valid"),
    [([], True), ([2, 3], True), ([0, 4], True), ([-1], False), ([1.5], False), ([True], False), ([2**62, 4], False),
     ([1] * 65, False), ("2", False), (None, False), ([0, 2**63], False)],
)  # fmt: skip
def test_shapes_that_a_tensor_can_have(value: object, valid: bool) -> None:
    assert is_shape(value) is valid


@pytest.mark.parametrize("limit", [None, 0], ids=["in memory", "in a private copy"])
def test_a_copied_file_may_be_overwritten_and_cut_short(tmp_path: Path, limit: int | None) -> None:
    path = save_tensors(tmp_path / "a.safetensors", example(), kind=KIND)
    found = load_tensors(path, kind=KIND, memory_map=False, memory_limit=limit)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    with path.open("rb+") as file:
        file.write(b"\0" * path.stat().st_size)
        file.truncate(0)
    assert equal(found.tensors, example())


def test_a_large_file_in_a_folder_that_cannot_be_written_is_copied_to_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tensors(tmp_path / "a.safetensors", example(), kind=KIND)
    real, full = tempfile.TemporaryFile, [tmp_path]

    def temporary(dir: Path | None) -> object:
        if dir in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    assert equal(load_tensors(path, kind=KIND, memory_map=False, memory_limit=0).tensors, example())
    full.append(None)  # type: ignore[arg-type]
    with pytest.raises(EditError, match=r"copy of .*a.safetensors on disk .*No space left on device.*Free disk space"):
        load_tensors(path, kind=KIND, memory_map=False, memory_limit=0)


def test_metadata_that_is_too_deep_or_has_huge_integers_is_refused_in_one_line(tmp_path: Path) -> None:
    deep: dict[str, object] = {}
    for _ in range(450):
        deep = {"a": deep}
    huge = "9" * 5000
    for text in (json.dumps(deep), "[" * 100_000, f'{{"count": {huge}}}', '{"count": 1' + "0" * 200 + "}"):
        tensors = {"w": torch.ones(2)}
        save_file(tensors, tmp_path / "a.safetensors", metadata={KIND: text, f"{KIND}.sha256": checksum(text, tensors)})
        with pytest.raises(EditError, match="is damaged: the metadata") as error:
            load_tensors(tmp_path / "a.safetensors", kind=KIND)
        assert len(str(error.value)) < 400
    with pytest.raises(EditError, match="metadata cannot be saved as JSON"):
        save_tensors(tmp_path / "b.safetensors", {}, deep, kind=KIND)
    nested: list[object] = []
    nested.append(nested)
    with pytest.raises(EditError, match="metadata cannot be saved as JSON"):
        save_tensors(tmp_path / "b.safetensors", {}, nested, kind=KIND)


@pytest.mark.parametrize("offsets", [f"[0, {'9' * 4300}]", "[" * 5000, f"[{'9' * 5000}, 0]"])
def test_headers_with_huge_integers_or_deep_lists_are_refused_in_one_line(tmp_path: Path, offsets: str) -> None:
    header = f'{{"w": {{"dtype": "F4", "shape": [2], "data_offsets": {offsets}}}}}'.encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(EditError, match="is not a valid safetensors file") as error:
        read_header(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_full_disk_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    path = save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)}, kind=KIND)
    monkeypatch.setattr(safetensors_file, "save_file", fail)
    with pytest.raises(EditError, match=r"a.safetensors cannot be written \(.*No space left on device.*; free disk"):
        save_tensors(path, {"w": torch.zeros(2)}, kind=KIND)
    assert load_tensors(path, kind=KIND).tensors["w"].tolist() == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    monkeypatch.undo()
    with pytest.raises(EditError, match=r"cannot be written \(.*(File exists|Not a directory)"):
        save_tensors(path / "b.safetensors", {"w": torch.zeros(2)}, kind=KIND)
