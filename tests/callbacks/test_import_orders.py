"""Callbacks are Lightning callbacks in either order of the imports, and do not import Lightning themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CREATE = """
from kedit_train.callbacks import EditCallback, NormBall, ParameterScope


class Counter(EditCallback):
    steps = 0

    def after_step(self, run):
        self.steps += 1


counter, others = Counter(), [ParameterScope(modules="body"), NormBall(0.01)]
"""
IMPORT = "import lightning as L\n"
FIT = """
import torch


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.body(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


options = dict(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
data = torch.utils.data.DataLoader(torch.ones(3, 2))
for callback in (counter, *others):
    assert isinstance(callback, L.Callback)
    assert isinstance(callback, L.pytorch.callbacks.Callback)
assert issubclass(Counter, L.Callback)
assert EditCallback.__mro__[-2:] == (L.Callback, object), EditCallback.__mro__
module = Module()
before = module.body.weight.detach().clone()
L.Trainer(callbacks=[*others, counter], **options).fit(module, data)
assert counter.steps == 3, counter.steps
assert 0.009 < (module.body.weight - before).abs().max() <= 0.01
alone = Counter()
L.Trainer(callbacks=alone, **options).fit(Module(), data)  # Lightning accepts a callback instead of a list.
assert alone.steps == 3, alone.steps
print("fitted")
"""
BROKEN_ONCE = """
import sys

import kedit_train.callbacks

sys.modules["lightning.pytorch.callbacks"] = None  # Python then refuses to import this module.
try:
    import lightning
except ImportError:
    pass
else:
    raise SystemExit("the first import did not fail")
for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
    del sys.modules[name]
"""
TRL = """
import sys

import kedit_train.core, kedit_train.delta
from kedit_train import EditDataset, EditSFTConfig, EditSFTTrainer, load_model

options = dict(max_steps=1, bf16=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
edit = dict(parameter_scope={"layers": 0.7}, norm_ball=True, edit_metrics=True)
model, tokenizer = load_model("world")
edits = EditDataset.load("world", limit=2)
trainer = EditSFTTrainer(model, args=EditSFTConfig("out", **options, **edit), edits=edits, processing_class=tokenizer)
trainer.train()
print([name for name in ("lightning", "torchmetrics") if name in sys.modules])
"""


def run(program: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(CREATE + IMPORT + FIT, id="lightning_last"),
        pytest.param(IMPORT + CREATE + FIT, id="lightning_first", marks=pytest.mark.slow),
        pytest.param(BROKEN_ONCE + CREATE + IMPORT + FIT, id="lightning_fails_once", marks=pytest.mark.slow),
    ],
)
def test_callbacks_train_in_lightning_in_either_order_of_the_imports(program: str, tmp_path: Path) -> None:
    assert run(program, tmp_path) == "fitted"


def test_an_edit_in_trl_imports_neither_lightning_nor_torchmetrics(tmp_path: Path) -> None:
    assert run(TRL, tmp_path) == "[]"
