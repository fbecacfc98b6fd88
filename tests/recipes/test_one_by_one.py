"""The script for edits that come one after the other, as a user runs it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kedit_train import EditDataset, EditDelta, catalog, evaluate, world

SCRIPT = catalog.folder("recipes") / "one_by_one.py"


def call(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env=quiet, cwd=folder)


def test_it_learns_edit_after_edit_and_leaves_what_came_of_it(tmp_path: Path) -> None:
    done = call(tmp_path, "--limit", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("stopped at step") == 2
    assert "| 2 | 1.000 " in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["reliability"]["generated"]["value"] == 1.0
    assert (tmp_path / "retention.png").stat().st_size > 1000
    model, tokenizer = world.load()
    before = copy.deepcopy(model.state_dict())
    EditDelta.load(tmp_path / "edit.safetensors").apply(model)
    found = evaluate(model, tokenizer, EditDataset.load("world", limit=2), progress=False)
    assert found.metrics["reliability"]["generated"].value == 1.0
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(1, 6)}


def test_the_texts_of_the_world_may_be_named(tmp_path: Path) -> None:
    assert call(tmp_path, "--texts", "world", "--limit", "1").returncode == 0


def test_plain_runs_without_what_must_stay(tmp_path: Path) -> None:
    done = call(tmp_path, "--plain", "--limit", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "KLLocality" not in done.stdout
    assert "NormBall" not in done.stdout


def test_what_was_learned_before_an_error_is_kept(tmp_path: Path) -> None:
    edits = EditDataset.load("world", limit=2)
    (tmp_path / "edits.jsonl").write_text(
        "".join(json.dumps({"prompt": edit.prompt, "target": edit.target}) + "\n" for edit in edits)
    )
    (tmp_path / "texts.txt").write_text(f"{edits[1].prompt} well known.\n")
    done = call(tmp_path, "--edits", "edits.jsonl", "--texts", "texts.txt")
    assert done.returncode == 1
    assert "error: KLLocality: every text" in done.stderr.splitlines()[-1]
    model, tokenizer = world.load()
    EditDelta.load(tmp_path / "edit.safetensors").apply(model)
    found = evaluate(model, tokenizer, edits[:1], progress=False)
    assert found.metrics["reliability"]["generated"].value == 1.0
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--edits", "mine.jsonl"), "error: --texts FILE: name texts that your model should answer as before"),
        (("--texts", "nowhere.txt"), "error: --texts nowhere.txt: there is no such file"),
        (("--limit", "0"), "error: --limit 0: give a number above 0"),
        (("--lr", "nan"), "error: --lr nan: give a number above 0"),
        (("--plain", "--room", "1"), "error: --plain holds nothing: leave out --texts and --room"),
        (("--output_dir", str(SCRIPT)), f"because {SCRIPT} is not a folder"),
        (("--room", "0"), "error: --room 0: give a number above 0"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = call(tmp_path, *options)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    # Before a model is loaded: nothing else is said.
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
