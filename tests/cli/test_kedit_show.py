"""The verb show: its numbers, table, picture and page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kedit_train import EditDelta, world
from kedit_train.cli.kedit.heat_map import _blocks, heat_map
from kedit_train.delta.tensor_change import Change

Kedit = Callable[..., tuple[int, str, str]]
WEIGHT = "model.layers.4.mlp.down_proj.weight"
PNG = b"\x89PNG\r\n\x1a\n"


def test_show_computes_what_numpy_does(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    """Rank, norms and shares, for a change of rank 2 in three rows and for the trained change."""
    base = {WEIGHT: torch.randn(8, 12), "n": torch.zeros(4, dtype=torch.int64)}
    edited = {name: value.clone() for name, value in base.items()}
    change = torch.zeros(8, 12)
    change[1], change[4], change[6] = torch.arange(12.0), torch.ones(12), 2 + torch.arange(12.0)
    edited[WEIGHT] += change
    edited["n"][2] = 5
    EditDelta.between(base, edited).save(tmp_path / "made.safetensors")
    code, output, _ = kedit("show", tmp_path / "made.safetensors", "--json")
    rows = {row["name"]: row for row in json.loads(output)["tensors"]}
    exact = (edited[WEIGHT].double() - base[WEIGHT].double()).numpy()
    singular = np.linalg.svd(exact, compute_uv=False)
    assert code == 0
    assert rows[WEIGHT]["layout"] == "rows"
    assert rows[WEIGHT]["rank"] == 2
    assert rows[WEIGHT]["moved"] == int((exact != 0).sum())
    assert rows[WEIGHT]["norm"] == pytest.approx(np.linalg.norm(exact), rel=1e-6)
    assert rows[WEIGHT]["stable_rank"] == pytest.approx((exact**2).sum() / singular[0] ** 2, rel=1e-4)
    assert rows[WEIGHT]["relative"] is None  # the delta holds three rows of the base
    assert (rows["n"]["norm"], rows["n"]["moved"]) == (None, 1)
    code, output, _ = kedit("show", edited_world / "edit.safetensors", "--json", "--no-ranks")
    found = json.loads(output)
    old, new = load_file(world.path() / "model.safetensors"), load_file(edited_world / "model" / "model.safetensors")
    exact = (new[WEIGHT].double() - old[WEIGHT].double()).numpy()
    (row,) = found["tensors"]
    assert (code, row["name"], row["rank"]) == (0, WEIGHT, None)
    assert row["relative"] == pytest.approx(np.linalg.norm(exact) / np.linalg.norm(old[WEIGHT].numpy()), rel=1e-5)
    assert row["largest"] == pytest.approx(np.abs(exact).max(), rel=1e-6)
    assert (found["scores"], found["edits"]["count"]) == ({"edit/reliability": 1.0}, 3)


def test_show_prints_a_table_and_writes_a_picture(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "edit.png"
    code, output, _ = kedit("show", edited_world / "edit.safetensors", "--png", picture)
    assert code == 0
    for part in (WEIGHT, "128x352", "ParameterScope(layers=0.7)", "edit/reliability 1.000", f"picture: {picture}"):
        assert part in output
    assert picture.read_bytes().startswith(PNG)
    code, _, err = kedit("show", edited_world / "edit.safetensors", "--png", picture)
    assert (code, "already exists" in err) == (1, True)


def test_show_writes_a_page(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    delta = tmp_path / "edit.safetensors"
    delta.write_bytes((edited_world / "edit.safetensors").read_bytes())
    code, output, _ = kedit("show", delta, "--html")
    assert (code, f"page: {tmp_path / 'edit.html'}" in output) == (0, True)
    page = (tmp_path / "edit.html").read_text(encoding="utf-8")
    row = next(line for line in output.splitlines() if line.startswith(WEIGHT))
    for part in (*row.split(), "layer 4", "ParameterScope(layers=0.7)", "edit/reliability 1.000"):
        assert part in page
    code, _, err = kedit("show", delta, "--html")
    assert (code, "already exists" in err) == (1, True)
    code, output, _ = kedit("show", delta, "--html", tmp_path / "other.html", "--json")
    assert json.loads(output)["html"] == str(tmp_path / "other.html")
    assert "edit.safetensors" not in EditDelta.load(delta)._repr_html_()
    assert "layer 4" in EditDelta.load(delta)._repr_html_()


def test_names_in_a_delta_do_not_become_html(kedit: Kedit, tmp_path: Path) -> None:
    name, license = "layers.0.<script>alert(1)</script>", "<img src=x onerror=alert(1)>"
    delta = EditDelta.between({name: torch.zeros(3, 2)}, {name: torch.ones(3, 2)}, license=license)
    assert kedit("show", delta.save(tmp_path / "edit.safetensors"), "--html")[0] == 0
    for page in ((tmp_path / "edit.html").read_text(encoding="utf-8"), delta._repr_html_()):
        assert "<script" not in page
        assert "<img" not in page
        assert "&lt;script&gt;alert(1)" in page


def test_control_characters_in_a_file_are_escaped(kedit: Kedit, tmp_path: Path) -> None:
    name = "w\x1b[2J\x07"
    delta = EditDelta.between({name: torch.zeros(3, 2)}, {name: torch.ones(3, 2)}, license="\x1b]0;owned\x07")
    file = delta.save(tmp_path / "edit.safetensors")
    code, output, _ = kedit("show", file)
    assert (code, "\x1b" in output, "\x07" in output) == (0, False, False)
    assert r"license \x1b]0;owned\x07" in output
    assert r"w\x1b[2J\x07" in output
    _, _, err = kedit("apply", file, "world", tmp_path / "out")
    assert r"the model has no tensor 'w\x1b[2J\x07'" in err


def test_show_of_a_few_entries_of_a_huge_matrix_takes_seconds(kedit: Kedit, tmp_path: Path) -> None:
    shape = (12_000, 12_000)
    places = torch.tensor([0, 5, 12_000 * 7 + 5, 12_000 * 11_999 + 11_999], dtype=torch.int32)
    after = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scattered = torch.randperm(shape[0])[:3000] * 12_000 + torch.randperm(shape[0])[:3000]
    many = scattered.sort().values.to(torch.int32)
    changes = {
        "w": Change("entries", places, torch.zeros(4), after, shape, "0" * 64),
        "v": Change("entries", many, torch.zeros(3000), torch.ones(3000), shape, "0" * 64),
    }
    meta = {"base": {"fingerprint": "0" * 64, "names": ["v", "w"]}}
    EditDelta(changes, meta=meta).save(tmp_path / "edit.safetensors")
    began = time.perf_counter()
    code, output, _ = kedit("show", tmp_path / "edit.safetensors", "--json")
    assert time.perf_counter() - began < 10
    rows = {row["name"]: row for row in json.loads(output)["tensors"]}
    singular = np.linalg.svd(np.array([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 4.0]]), compute_uv=False)
    assert (code, rows["w"]["rank"]) == (0, 3)
    assert rows["w"]["stable_rank"] == pytest.approx((singular**2).sum() / singular[0] ** 2)
    # So many rows and columns changed that the rank would take minutes.
    assert (rows["v"]["rank"], rows["v"]["norm"]) == (None, pytest.approx(3000**0.5))
    code, output, _ = kedit("show", tmp_path / "edit.safetensors")
    assert (
        "rank: not computed for 1 tensor: too many rows and columns with changed entries (see kedit show --help)"
        in output
    )


def test_the_heat_map_shows_every_change_at_its_place(tmp_path: Path) -> None:
    difference = torch.zeros(300, 1000)
    difference[299, 0] = 4.0
    blocks = _blocks(difference)
    assert blocks.shape == (128, 128)
    assert blocks.nonzero().tolist() == [[127, 0]]
    small = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert torch.equal(_blocks(small), small.abs())
    base = {f"model.layers.{i}.mlp.{n}_proj.weight": torch.zeros(4, 4) for i in range(5) for n in ("up", "down")}
    edited = {name: value + i for i, (name, value) in enumerate(base.items(), start=1)} | {"norm.weight": torch.ones(3)}
    path = heat_map(EditDelta.between(base | {"norm.weight": torch.zeros(3)}, edited), tmp_path / "all.png")
    assert path.read_bytes().startswith(PNG)
