"""Fragments: complete by themselves, and joining a run that knows nothing of this package."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kedit_train.callbacks
from kedit_train import catalog, world

FRAGMENTS = sorted(catalog.folder("callbacks").glob("*.yaml"))
CALLBACKS = {
    name: value
    for name in kedit_train.callbacks.__all__
    if inspect.isclass(value := getattr(kedit_train.callbacks, name))
    and issubclass(value, kedit_train.callbacks.EditCallback)
    and name != "EditCallback"
}
# A scope without arguments would train everything, so its fragment names the layers and modules of the recipes.
VALUES = {"ParameterScope": {"layers": "0.5-0.8", "modules": "mlp.down_proj"}}
TRAIN = """
import json
import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LightningCLI
from transformers import AutoModelForCausalLM, AutoTokenizer


class Mine(L.LightningModule):
    def __init__(self, checkpoint: str, lr: float = 1e-3):
        super().__init__()
        self.lr = lr
        self.net = AutoModelForCausalLM.from_pretrained(checkpoint).train()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in open("corpus.txt").read().splitlines()]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.rows, batch_size=1)

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Own(L.Callback):
    def __init__(self, path: str):
        self.path = path

    def on_train_end(self, trainer, module):
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        names = [type(callback).__name__ for callback in trainer.callbacks]
        json.dump({"callbacks": names, "steps": trainer.global_step, "metrics": metrics}, open(self.path, "w"))


if __name__ == "__main__":
    LightningCLI(Mine)
"""
MY_RUN = """
model: {checkpoint: CHECKPOINT}
trainer:
  max_steps: 4
  accelerator: cpu
  logger: false
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks:
  - class_path: __main__.Own
    init_args: {path: seen.json}
"""


def test_every_callback_has_a_fragment_and_stands_in_the_gallery() -> None:
    added = {yaml.safe_load(f.read_text())["trainer"]["callbacks+"][0]["class_path"] for f in FRAGMENTS}
    assert added == {f"kedit_train.callbacks.{name}" for name in CALLBACKS}
    gallery = (catalog.folder("callbacks") / "README.md").read_text()
    assert all(f"({fragment.name})" in gallery for fragment in FRAGMENTS)


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.stem)
def test_a_fragment_has_every_argument_with_its_default_and_a_comment(fragment: Path) -> None:
    content = yaml.safe_load(fragment.read_text())
    assert content.keys() == {"trainer"}
    assert content["trainer"].keys() == {"callbacks+"}
    (entry,) = content["trainer"]["callbacks+"]
    callback = entry["class_path"].rpartition(".")[2]
    parameters = inspect.signature(CALLBACKS[callback]).parameters
    assert list(entry["init_args"]) == list(parameters)
    for name, parameter in parameters.items():
        expected = VALUES.get(callback, {}).get(name, parameter.default)
        if expected is not inspect.Parameter.empty:
            assert entry["init_args"][name] == expected, name
    lines = fragment.read_text().splitlines()
    assert any(f"--config callbacks/{fragment.name}" in line for line in lines[:6])
    for i, line in enumerate(lines):
        if line.startswith("        ") and not line.strip().startswith("#"):
            assert lines[i - 1].strip().startswith("#"), line


def test_fragments_join_a_project_that_knows_nothing_of_them(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "my_run.yaml").write_text(MY_RUN.replace("CHECKPOINT", str(world.path())))
    texts = world.prose(12)
    (tmp_path / "corpus.txt").write_text("\n".join(texts[:6]))
    (tmp_path / "texts_that_must_stay.txt").write_text("\n".join(texts[6:]))
    fragments = [f"--config={catalog.folder('callbacks') / name}.yaml" for name in ("kl_locality", "token_smoothing")]
    ended = subprocess.run(
        [sys.executable, "train.py", "fit", "--config=my_run.yaml", *fragments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [name for name in seen["callbacks"] if name in ("Own", *CALLBACKS)] == [
        "Own",
        "KLLocality",
        "TokenSmoothing",
    ]
    assert seen["steps"] == 4
    # Both did their work: the divergence was measured on moved weights, tokens were scored.
    assert seen["metrics"]["edit/locality/kl"] > 0.0
    assert 0.0 < seen["metrics"]["edit/tokens/active"] <= 1.0
