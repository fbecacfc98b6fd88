"""Every callback of the table under the conditions of real runs: accumulation, bf16, an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from conformance.settings import SETTINGS
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import TrainerCallback

from kedit_train import world
from kedit_train.callbacks import EditMetrics, ParameterScope
from kedit_train.data import EditDataset

# EditMetrics only looks, and is slow; it has its own tests.
TRAINING = [name for name in SETTINGS if name != "EditMetrics"]


def run(host: str, callback: str, steps: int, *more: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights before, weights after) with ``callback`` on one matrix."""
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=16))
    made = [c for c in SETTINGS[callback](edits) if not isinstance(c, ParameterScope | EditMetrics)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scope = ParameterScope(layers=0.5, modules="mlp.down_proj")
    HOSTS[host](model, tokenizer, edits, [*made, scope, *more], steps, **options)
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("callback", TRAINING)
def test_accumulated_batches_are_one_batch(callback: str, host: str) -> None:
    averaged = host not in ("Trainer", "SFTTrainer")
    if averaged:
        # Lightning averages its micro-batches, so they have to weigh alike for the sums to agree.
        window = "accumulate_grad_batches" if host == "Lightning" else "accumulate"
        pairs = [{"batch_size": 8}, {"batch_size": 2, window: 4}]
    else:
        pairs = [
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        ]
    (before, whole), (_, parts) = (run(host, callback, 2, **options) for options in pairs)
    moved = torch.cat([(whole[n] - before[n]).flatten() for n in whole])
    apart = torch.cat([(whole[n] - parts[n]).flatten() for n in whole])
    assert moved.norm() > 0
    # Adam's first steps are the signs of the gradients, so a last bit can cost a whole step in single entries; and the
    # token means of micro-batches with unlike token counts are not the mean over all (Lightning's own accumulation).
    assert apart.norm() < (0.5 if averaged else 2e-2) * moved.norm()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("callback", TRAINING)
def test_bf16_autocast_trains_the_scope_alone(callback: str, host: str) -> None:
    options: dict[str, Any] = {"precision": "bf16-mixed"} if host in ("Lightning", "Fabric") else {"bf16": True}
    before, after = run(host, callback, 2, **options)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"model.layers.3.mlp.down_proj.weight"}
    assert all(torch.isfinite(value).all() for value in after.values())


class Stop(TrainerCallback):
    """Ends the run after step 2, as a scheduler that takes the machine away."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            control.should_training_stop = True


@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("callback", TRAINING)
def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(callback: str, host: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    _, whole = run(host, callback, 4, output_dir=str(tmp_path / "whole"), **options)
    folder = str(tmp_path / "parts")
    run(host, callback, 4, Stop(), output_dir=folder, **options)
    _, resumed = run(host, callback, 4, output_dir=folder, resume=True, **options)
    assert [n for n in whole if not torch.equal(whole[n].view(torch.int32), resumed[n].view(torch.int32))] == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("callback", TRAINING)
def test_an_interrupted_lightning_run_does_so_too(callback: str, tmp_path: Path) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")

    # Two batches an epoch: with a plain loader Lightning begins an interrupted epoch anew.
    options: dict[str, Any] = {"batch_size": 8, "enable_checkpointing": True}
    _, whole = run("Lightning", callback, 4, saver(), **options)
    _, resumed = run("Lightning", callback, 4, saver(), ckpt_path=str(tmp_path / "step=2.ckpt"), **options)
    assert [n for n in whole if not torch.equal(whole[n].view(torch.int32), resumed[n].view(torch.int32))] == []


@pytest.mark.parametrize("callback", SETTINGS)
def test_one_instance_serves_two_fits(callback: str) -> None:
    # In every host at once: test_conformance.
    edits = EditDataset(world.edits(n=8))
    used, finals = SETTINGS[callback](edits), []
    for _ in range(2):
        model, tokenizer = world.load()
        HOSTS["loop"](model, tokenizer, edits, used, 3)
        finals.append({name: p.detach().clone() for name, p in model.named_parameters()})
    first, second = finals
    assert [n for n in first if not torch.equal(first[n].view(torch.int32), second[n].view(torch.int32))] == []
