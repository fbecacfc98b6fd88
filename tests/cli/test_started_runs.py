"""Complete runs, started as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kedit_train import world
from kedit_train.cli.launcher import free_port

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
model: {learning_rate: 1.0e-2}
data: {path: world, limit: 8, batch_size: 2}
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  enable_progress_bar: false
  default_root_dir: out
  callbacks:
  - class_path: kedit_train.callbacks.ParameterScope
    init_args: {layers: 0.6, modules: mlp.down_proj}
  - class_path: kedit_train.callbacks.TokenSmoothing
  - class_path: kedit_train.callbacks.KLLocality
    init_args: {texts: keep.txt, batch_size: 4}
  - class_path: kedit_train.callbacks.EditMetrics
    init_args: {every_n_steps: 0, report_path: out/report.json}
"""


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "keep.txt").write_text("\n".join(world.prose(40)))
    return tmp_path


def start(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "PL_")) and k not in ("WORLD_SIZE", "RANK")}
    environment = {**keep, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def written(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the report of a run and its resolved configuration."""
    assert [path.name for path in folder.rglob("report.json")] == ["report.json"]
    report = json.loads((folder / "out" / "report.json").read_text())
    return report, yaml.safe_load((folder / "out" / "resolved.yaml").read_text())


def test_a_recipe_runs_from_its_file(there: Path) -> None:
    ended = start(
        there, sys.executable, "-m", "kedit_train", "fit", "--config", "recipe.yaml", "--model.save_path", "m"
    )
    assert ended.returncode == 0, ended.stderr
    report, resolved = written(there)
    assert report["meta"]["steps"] == 12  # 8 edits, 2 a batch, 3 epochs
    assert report["meta"]["scope"]["tensors"] == ["model.layers.3.mlp.down_proj.weight"]
    assert report["unedited"]["reliability"]["generated"]["value"] == 0.0
    assert report["metrics"]["reliability"]["generated"]["n"] == 8
    assert report["metrics"]["reliability"]["generated"]["value"] >= 0.5
    assert resolved["model"]["class_path"].endswith(".EditModule")

    # The saved model gives the answers of the report.
    import torch

    from kedit_train.pretrained import load_model

    model, tokenizer = load_model(str(there / "m"))
    right = next(row for row in report["answers"] if row["question"] == "reliability" and row["right"])
    prompt = torch.tensor([tokenizer(right["prompt"])["input_ids"]])
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
    assert tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True).strip() == right["answer"]


LIGHTNING = (tool("lightning"), "run", "recipe.yaml", "--devices", "2", "--strategy", "ddp")
SCRIPT = str(ROOT / "recipes" / "edit.py")
FABRIC = (tool("fabric"), "run", "--devices", "2", SCRIPT, "fit", "--config", "recipe.yaml")


@pytest.mark.parametrize("command", [LIGHTNING, FABRIC], ids=["lightning run", "fabric run"])
@pytest.mark.slow
def test_a_recipe_runs_on_two_processes(there: Path, command: tuple[str, ...]) -> None:
    port = () if command[1:3] == ("run", "recipe.yaml") else ("--main-port", str(free_port()))
    ended = start(there, *command[:2], *port, *command[2:])
    assert ended.returncode == 0, ended.stderr
    report, resolved = written(there)
    # Each process trains on half of the batches: 2 steps per epoch; two separate runs would take 4.
    assert report["meta"]["steps"] == 6
    assert resolved["trainer"]["devices"] == 2
    assert ended.stdout.count("report: ") == 1
    assert "terminate called" not in ended.stderr


@pytest.mark.slow
def test_a_contradicting_process_count_stops_the_run(there: Path) -> None:
    ended = start(there, tool("lightning"), "run", "recipe.yaml", "--devices", "2", "--trainer.devices", "1")
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "started 2" in errors[0]
    assert "Traceback" not in ended.stderr
    assert not (there / "out").exists()


@pytest.mark.slow
def test_the_trl_script_runs_on_two_processes(there: Path) -> None:
    ended = start(there, tool("lightning"), "run", "trl_sft", "--devices", "2", "--epochs", "2", "--output_dir", "out")
    assert ended.returncode == 0, ended.stderr
    report = json.loads((there / "out" / "report.json").read_text())
    # 32 edits in batches of 16 on two processes: one step an epoch.
    assert report["meta"]["steps"] == 2
    assert ended.stdout.count("report: ") == 1
    assert (there / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_recipe_runs_in_trl_on_two_processes(there: Path) -> None:
    several = ("--nproc-per-node", "2", "--master-port", str(free_port()))
    ended = start(there, tool("torchrun"), *several, "-m", "kedit_train", "sft", "--config", "recipe.yaml")
    assert ended.returncode == 0, ended.stderr
    report = json.loads((there / "out" / "report.json").read_text())
    assert report["meta"]["steps"] == 6  # as in Lightning, above
    assert ended.stdout.count("report: ") == 1
    assert "FutureWarning" not in ended.stderr
