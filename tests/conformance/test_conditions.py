"""Every callback with gradient accumulation, under bf16 autocast, and when a run is interrupted and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from conformance.settings import ALL, in_scope, load, one_host_each
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import TrainerCallback

from kedit_train import world
from kedit_train.callbacks import EditMetrics, ParameterScope
from kedit_train.data import EditDataset

# EditMetrics does not change the weights and is slow. It has its own tests.
TRAINING = [name for name in ALL if name != "EditMetrics"]
# Each of these restores another kind of state. The default run resumes each of them alone, and test_resume.py resumes
# all callbacks together.
STATEFUL = (
    "GatedAdapter",
    "KLLocality",
    "NullSpace",
    "GradientMask",
    "ForgetFirst",
    "ActiveSet",
    "StopWhenEdited",
    "ForgettingBudget",
    "OutputAnchor",
    "ForecastMetrics",
)


def run(host: str, callback: str, steps: int, *more: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train one matrix with ``callback``; return the weights before and after."""
    torch.manual_seed(0)
    model, tokenizer = load(callback)
    edits = EditDataset(world.edits(n=16))
    callbacks = [c for c in ALL[callback](edits) if not isinstance(c, ParameterScope | EditMetrics)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scope = ParameterScope(layers=0.5, modules="mlp.down_proj")
    HOSTS[host](model, tokenizer, edits, [*callbacks, scope, *more], steps, **options)
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("callback", "host"), one_host_each(TRAINING, HOSTS))
def test_accumulated_batches_give_the_weights_of_one_batch(callback: str, host: str) -> None:
    averaged = host not in ("Trainer", "SFTTrainer")
    if averaged:
        # Lightning averages its micro-batches.
        window = "accumulate_grad_batches" if host == "Lightning" else "accumulate"
        pairs = [{"batch_size": 8}, {"batch_size": 2, window: 4}]
    else:
        pairs = [
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        ]
    (before, one_batch), (_, accumulated) = (run(host, callback, 2, **options) for options in pairs)
    moved = torch.cat([(one_batch[n] - before[n]).flatten() for n in before])
    difference = torch.cat([(one_batch[n] - accumulated[n]).flatten() for n in before])
    assert moved.norm() > 0
    # The first steps of Adam are the signs of the gradients, so a rounding difference can change an entry by a whole
    # step. Lightning averages token means of micro-batches with different token counts, which is not the mean over all.
    assert difference.norm() < (0.5 if averaged else 2e-2) * moved.norm()


@pytest.mark.parametrize(("callback", "host"), one_host_each(TRAINING, HOSTS))
def test_bf16_autocast_trains_only_the_scope(callback: str, host: str) -> None:
    options: dict[str, Any] = {"precision": "bf16-mixed"} if host in ("Lightning", "Fabric") else {"bf16": True}
    before, after = run(host, callback, 2, **options)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == in_scope(after)
    assert all(torch.isfinite(value).all() for value in after.values())


def assert_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert [n for n in first if not torch.equal(first[n].view(torch.int32), second[n].view(torch.int32))] == []


class Stop(TrainerCallback):
    """End the run after step 2, as a cluster scheduler may do."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            control.should_training_stop = True


@pytest.mark.parametrize(("callback", "host"), one_host_each(TRAINING, ["Trainer", "SFTTrainer"], only=STATEFUL))
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(callback: str, host: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    _, uninterrupted = run(host, callback, 4, output_dir=str(tmp_path / "whole"), **options)
    folder = str(tmp_path / "parts")
    run(host, callback, 4, Stop(), output_dir=folder, **options)
    _, resumed = run(host, callback, 4, output_dir=folder, resume=True, **options)
    assert_same_bits(uninterrupted, resumed)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "callback", [name if name in STATEFUL else pytest.param(name, marks=pytest.mark.slow) for name in TRAINING]
)
def test_a_resumed_lightning_run_ends_with_the_weights_of_an_uninterrupted_one(callback: str, tmp_path: Path) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")

    # With a plain data loader Lightning starts an interrupted epoch again, so the checkpoint is at the end of one.
    options: dict[str, Any] = {"batch_size": 8, "enable_checkpointing": True}
    _, uninterrupted = run("Lightning", callback, 4, saver(), **options)
    _, resumed = run("Lightning", callback, 4, saver(), ckpt_path=str(tmp_path / "step=2.ckpt"), **options)
    assert_same_bits(uninterrupted, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("callback", ALL)
def test_one_instance_serves_two_runs(callback: str) -> None:
    # test_conformance runs all callbacks together twice, in every host.
    edits = EditDataset(world.edits(n=8))
    callbacks, results = ALL[callback](edits), []
    for _ in range(2):
        model, tokenizer = load(callback)
        HOSTS["loop"](model, tokenizer, edits, callbacks, 3)
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    first, second = results
    assert_same_bits(first, second)
