"""recipes/instruction_tuning.py, as a user runs it, on the bundled model."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from kedit_train import catalog, world
from kedit_train.errors import EditError
from kedit_train.pretrained import load_model

SCRIPT = catalog.folder("recipes") / "instruction_tuning.py"


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    texts = folder / "keep.txt"
    texts.write_text("\n".join(world.prose(24)))
    records = [{"prompt": edit.prompt, "completion": f" {edit.target}"} for edit in world.edits(12)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    given = ["--model", "world", "--data", str(folder / "data.jsonl"), "--texts", str(texts), "--held_out", "4"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, "--output_dir", str(folder / "out"), *options])
    return runpy.run_path(str(SCRIPT))["main"]()


@pytest.mark.filterwarnings("ignore:ForgettingBudget. the divergence is")
@pytest.mark.parametrize("plain", [False, True])
def test_it_trains_within_a_budget_and_prints_what_it_measured(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, monkeypatch, "--epochs", "6", "--learning_rate", "5e-3", *(["--plain"] if plain else []))
    *_, answers, divergence = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"exactly right answers: 0\.\d\d before, [01]\.\d\d after", answers)
    measured = re.fullmatch(
        r"KL on the texts: (\d\.\d{4}) nats per token" + ("" if plain else ", budget 0.01"), divergence
    )
    assert measured is not None
    assert float(measured[1]) > 0.0
    saved, _ = load_model(str(tmp_path / "out" / "model"))
    before = dict(world.load()[0].named_parameters())
    moved = {name for name, weight in saved.named_parameters() if not weight.equal(before[name])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (3, 4)}


def test_a_test_set_without_training_data_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EditError, match=r"--held_out must be in 1 to 11, got 12\."):
        run(tmp_path, monkeypatch, "--held_out", "12")
