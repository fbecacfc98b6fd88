"""recipes/representation_control.yaml, as a user runs it, on the bundled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from kedit_train import catalog
from kedit_train.control import ValueModel

RECIPE = catalog.folder("recipes") / "representation_control.yaml"


def test_the_header_names_the_command_and_the_measured_rewards() -> None:
    lines = RECIPE.read_text().splitlines()
    assert len(lines) <= 60
    assert all(len(line) <= 120 for line in lines)
    header = [line for line in lines if line.startswith("#")]
    assert any("lightning run recipes/representation_control.yaml" in line for line in header)
    assert any(line.startswith("# Measured: ") for line in header)
    content = yaml.safe_load(RECIPE.read_text())
    assert content["trainer"]["default_root_dir"] == "runs/representation_control"
    trained = set(content["data"]["init_args"]["prompts"])
    assert not trained & set(content["trainer"]["callbacks"][-1]["init_args"]["prompts"])


def test_it_trains_a_value_function_and_logs_rewards(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("The", "In", "It")))
    options = ["--model.name", "world", "--model.layers", "[1]", "--data.prompt_format", "plain"]
    options += [
        "--data.prompts",
        "prompts.jsonl",
        "--data.sampling.samples",
        "2",
        "--data.sampling.max_new_tokens",
        "4",
    ]
    options += ["--data.reward", "kedit_train.control.PatternReward", "--data.reward.pattern", "a|e"]
    options += ["--data.validation", "0.4", "--trainer.callbacks.prompts", '["A"]', "--trainer.max_epochs", "1"]
    options += ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--trainer.accelerator", "cpu"]
    options += ["--trainer.callbacks.max_new_tokens", "4"]
    ended = subprocess.run(
        [sys.executable, "-m", "kedit_train.cli.launcher", "run", str(RECIPE), *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert "reward " in ended.stdout
    value = ValueModel.load(tmp_path / "runs" / "representation_control" / "value.safetensors")
    assert value.layers == ("1",)
    (metrics,) = (tmp_path / "logs").rglob("metrics.csv")
    header = metrics.read_text().splitlines()[0].split(",")
    assert {"value/validation_error", "control/reward_before", "control/reward_after"} <= set(header)
