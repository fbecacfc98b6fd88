"""The verb sweep: its scores equal those of each multiple evaluated by hand, and its delta applies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kedit_train import EditDataset, EditDelta, evaluate, world

Kedit = Callable[..., tuple[int, str, str]]
PNG = b"\x89PNG\r\n\x1a\n"
WEIGHT = "model.layers.4.mlp.down_proj.weight"


def byhand(edited_world: Path, coefficient: float) -> tuple[float, float]:
    """Return reliability and locality of the bundled model plus a multiple of the edit."""
    edits = EditDataset.load(edited_world / "edits.jsonl")
    model, tokenizer = world.load()
    before = evaluate(model, tokenizer, edits, progress=False)
    with torch.no_grad():
        model.get_parameter(WEIGHT).add_(
            coefficient * EditDelta.load(edited_world / "edit.safetensors").difference(WEIGHT)
        )
    after = evaluate(model, tokenizer, edits, unedited=before, progress=False).metrics
    return after["reliability"]["generated"].value, after["locality"]["generated"].value


def test_scores_pick_plot_and_delta(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    picture, out = tmp_path / "new" / "sweep.png", tmp_path / "picked.safetensors"
    words = ("sweep", edited_world / "edit.safetensors", "world", edited_world / "edits.jsonl", "--keep-locality", 0.5)
    words = (*words, "--coefficients", 1, 0.4, "--plot", picture, "--out", out)
    code, output, _ = kedit(*words, "--json")
    found = json.loads(output)
    assert code == 0
    assert [point["coefficient"] for point in found["points"]] == [0.0, 0.4, 1.0]
    for point in found["points"]:
        assert (point["reliability"], point["locality"]) == pytest.approx(byhand(edited_world, point["coefficient"]))
    assert found["points"][0]["locality"] == 1.0
    best = max((p for p in found["points"][1:] if p["locality"] >= 0.5), key=lambda p: p["reliability"])
    assert found["picked"] == best["coefficient"]
    assert found["written"] == [str(picture), str(out)]
    assert picture.read_bytes().startswith(PNG)
    base = world.load()[0]
    start = base.get_parameter(WEIGHT).detach().clone()
    delta = EditDelta.load(out)
    delta.apply(base)
    step = EditDelta.load(edited_world / "edit.safetensors").difference(WEIGHT)
    assert torch.equal(base.get_parameter(WEIGHT), start + found["picked"] * step)
    assert delta.meta["configuration"]["rule"] == found["rule"]

    code, _, err = kedit(*words)
    assert (code, "--force" in err) == (1, True)
    code, output, _ = kedit(*words, "--force", "--limit", 2)
    lines = [line.split() for line in output.splitlines()]
    assert code == 0
    assert ["coefficient", "reliability", "locality"] in lines
    assert [line[0] for line in lines if line and line[0] in ("0", "0.4", "1")] == ["0", "0.4", "1"]
    assert "picked " in output
    assert f"saved: {out} (" in output


def test_forget_counts_edits_that_are_no_longer_answered(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    """A delta from the edited model back to the base, swept on the edited model."""
    back = EditDelta.between(edited_world / "model", world.path())
    back.save(tmp_path / "back.safetensors")
    words = ("sweep", tmp_path / "back.safetensors", edited_world / "model", edited_world / "edits.jsonl", "--forget")
    code, output, _ = kedit(*words, "--coefficients", 1, "--keep-locality", 0, "--json")
    found = json.loads(output)
    before, after = byhand(edited_world, 1.0)[0], byhand(edited_world, 0.0)[0]
    assert code == 0
    assert [point["reliability"] for point in found["points"]] == pytest.approx([1 - before, 1 - after])
    assert after < before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--coefficients=1e-6",),
            "sweep: none of the coefficients with enough locality has a higher reliability than the base model "
            "(0.000); use coefficients farther from 0, lower keep_locality, or train the edit longer.",
        ),
        (("--coefficients=60", "--keep-locality=1"), "sweep: no coefficient keeps a locality of at least 1.000 "),
    ],
)
def test_nothing_is_picked_if_no_coefficient_keeps_the_rule(
    kedit: Kedit, edited_world: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    """The table is printed all the same, and no file is written."""
    out = tmp_path / "picked.safetensors"
    files = (edited_world / "edit.safetensors", "world", edited_world / "edits.jsonl")
    code, output, err = kedit("sweep", *files, *words, "--out", out)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines), out.exists()) == (1, 1, False)
    assert lines[0].startswith(f"error: {message}")
    coefficient = f"{float(words[0].partition('=')[2]):g}"
    assert [line.split()[0] for line in output.splitlines() if line.strip()][-1] == coefficient
    assert "picked" not in output
    code, output, err = kedit("sweep", *files, *words, "--out", out, "--json")
    found = json.loads(output)
    assert (code, found["picked"], found["written"], len(found["points"])) == (1, None, [], 2)


EDITS = ("edit.safetensors", "world", "edits.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edit.safetensors", "model", "edits.jsonl"], "pass the unedited model as MODEL"),
        (["none.safetensors", "world", "edits.jsonl"], "does not exist"),
        (["edit.safetensors", "world", "none.jsonl"], "the file does not exist"),
        (["edit.safetensors", "world", "bare.jsonl"], "contains no locality questions, which are needed"),
        ([*EDITS, "--coefficients", "0"], "must contain a number other than 0"),
        ([*EDITS, "--keep-locality", "1.5"], "must be in [0, 1], got 1.5"),
        ([*EDITS, "--plot", "sweep.jpg"], "must end with .png"),
        ([*EDITS, "--out", "new.bin"], "must end with .safetensors"),
        ([*EDITS, "--out", "edit.safetensors", "--force"], "would replace the delta that this sweep reads"),
        ([*EDITS, "--device", "nowhere"], "--device nowhere"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    kedit: Kedit, edited_world: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(edited_world)
    Path("bare.jsonl").write_text(json.dumps({"prompt": "Luvumouth stands on the river", "target": "Tutava"}) + "\n")
    before = sorted(path.name for path in edited_world.iterdir())
    code, out, err = kedit("sweep", *words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(lines)) == (1, "", 1), err
    assert message in lines[0]
    assert sorted(path.name for path in edited_world.iterdir()) == before


def test_a_coefficient_must_be_a_finite_number(kedit: Kedit, edited_world: Path) -> None:
    code, _, err = kedit("sweep", edited_world / "edit.safetensors", "world", "world", "--coefficients", "nan")
    assert (code, "expected a finite number, got nan" in err) == (2, True)
