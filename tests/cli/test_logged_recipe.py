"""A run of a W&B sweep logs its recipe, its data, its callbacks and the score that the sweep maximizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from callbacks.wandb_offline import OfflineRun

from kedit_train import EditDataset, world
from kedit_train.cli.main import main
from kedit_train.modes.tuning.halving import Trial
from kedit_train.modes.tuning.recipe import Source, recipe_text, sweep_text
from kedit_train.modes.tuning.settings import TuneGrid, TuneSetting

# The recipes of these tests run as on the command line, where warnings are only printed.
pytestmark = pytest.mark.filterwarnings("ignore")

META = {"seed": 3, "append_eos": False, "prompt_format": "plain", "date": "2026-11-26T00:00", "protocol": "leading"}


@pytest.fixture
def edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EditDataset:
    """Write the files of a sweep and of its data into an empty current folder, and return the edits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    wandb.teardown()
    edits = EditDataset.load("world", limit=3)
    edits.save("edits.jsonl")
    Path("keep.txt").write_text("\n".join(world.locality_texts(exclude=edits, n=8)))
    setting = TuneSetting(layers=0.7, modules="mlp.down_proj.weight", step_size=0.01, energy=0.8, kl_weight=0.0)
    trial = Trial(setting=setting, edits=3, reliability=1.0, generality=None, locality=0.5)
    source = Source(model="world", edits="edits.jsonl", keep="keep.txt", path=Path("w_recipe.yaml"))
    Path("w_recipe.yaml").write_text(recipe_text(trial, trial, source, "a rule", META, with_kl=True))
    grid = TuneGrid(layers=["0.5-0.7"], step_sizes=[0.1], energies=[0.9], kl_weights=[0.5])
    Path("w.yaml").write_text(sweep_text(grid, Path("w_recipe.yaml"), Path("w.yaml")))
    return edits


def callback(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    (arguments,) = [c["init_args"] for c in recipe["trainer"]["callbacks"] if c["class_path"].endswith(f".{name}")]
    return arguments


def test_a_run_of_a_sweep_logs_its_settings_and_scores(edits: EditDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = yaml.safe_load(Path("w.yaml").read_text())
    # What an agent of W&B passes in place of ${args}.
    chosen = [f"--{name}={each['values'][0]}" for name, each in sweep["parameters"].items()]
    words = [*sweep["command"][sweep["command"].index("fit") : -1], *chosen]
    monkeypatch.setattr(sys, "argv", ["kedit_train", *words, "--trainer.max_epochs=2"])
    main()
    wandb.finish()
    run = OfflineRun(Path())

    recipe = run.config["recipe"]
    assert callback(recipe, "PolyakStep") == {"step_size": 0.1}
    assert callback(recipe, "NullSpace")["energy"] == 0.9
    assert callback(recipe, "KLLocality")["weight"] == 0.5
    assert (recipe["seed_everything"], recipe["trainer"]["max_epochs"]) == (3, 2)
    assert recipe["data"]["init_args"]["path"] == "edits.jsonl"
    assert yaml.safe_load(Path("resolved.yaml").read_text())["data"] == recipe["data"]
    assert run.config["edit"]["data_hash"] == edits.hash
    assert run.config["edit"]["arguments"]["ParameterScope"]["layers"] == "0.5-0.7"

    report = json.loads(Path("runs/w_recipe/report.json").read_text())["metrics"]
    assert sweep["metric"] == {"name": "edit/locality_tokens_kept", "goal": "maximize"}
    assert run.summary["edit/locality_tokens_kept"] == report["locality"]["tokens_kept"]["value"]
    assert run.summary["edit/reliability"] == report["reliability"]["generated"]["value"]
    assert run.summary["edit/generality"] == report["generality"]["generated"]["value"]


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_other_loggers_receive_the_recipe(logger: str, edits: EditDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    if logger == "TensorBoardLogger":
        pytest.importorskip("tensorboard", reason="tensorboard is missing; pip install tensorboard")
    words = ["fit", "--config", "w_recipe.yaml", "--trainer.max_epochs=1", f"--trainer.logger={logger}"]
    monkeypatch.setattr(sys, "argv", ["kedit_train", *words, "--trainer.logger.save_dir=logged"])
    main()
    (path,) = Path("logged").rglob("hparams.yaml")
    recipe = yaml.safe_load(path.read_text())["recipe"]
    assert callback(recipe, "PolyakStep") == {"step_size": 0.01}
    assert recipe["trainer"]["max_epochs"] == 1


def test_a_run_without_a_logger_writes_only_files(edits: EditDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kedit_train", "fit", "--config", "w_recipe.yaml", "--trainer.max_epochs=1"])
    main()
    assert Path("runs/w_recipe/resolved.yaml").exists()
    assert list(Path().rglob("*.wandb")) == []
