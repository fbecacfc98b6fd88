"""Runs that are resumed at their last step: they take no further step, and their edit ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS, collator
from conformance.interrupted_runs import assert_clean, assert_same_bits, callbacks, loop, train, weights
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from kedit_train import EditDelta, world
from kedit_train.callbacks import ParameterScope, SaveDelta, TokenLoss
from kedit_train.data import EditDataset


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_lightning_from_the_last_checkpoint_ends_the_edit(tmp_path: Path) -> None:
    def fit(**options: Any) -> Any:
        model, tokenizer = world.load()
        torch.manual_seed(0)
        used, edits = [*callbacks(), SaveDelta(str(tmp_path / "edit.safetensors"))], EditDataset(world.edits(n=8))
        trainer = HOSTS["Lightning"](model, tokenizer, edits, used, 2, batch_size=8, **options)
        return model, trainer

    model, trainer = fit()
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (tmp_path / "edit.safetensors").rename(tmp_path / "whole.safetensors")
    # Lightning takes no step and does not say that training has ended.
    again, _ = fit(ckpt_path=str(tmp_path / "end.ckpt"))
    assert_same_bits(weights(model), weights(again))
    assert_clean(again)
    whole, resumed = (EditDelta.load(tmp_path / f"{name}.safetensors") for name in ("whole", "edit"))
    assert resumed.meta == whole.meta
    assert all(torch.equal(resumed.changes[name].after, change.after) for name, change in whole.changes.items())


def test_a_trainer_that_is_resumed_at_its_last_step_in_an_epoch_takes_no_step(tmp_path: Path) -> None:
    model, again = world.load()[0], world.load()[0]
    # An epoch has three steps. The stock trainer would take the third one.
    train(model, tmp_path, callbacks(), steps=2)
    trainer = train(again, tmp_path, callbacks(), steps=2, resume=True)
    assert trainer.state.global_step == 2
    assert_same_bits(weights(model), weights(again))
    assert_clean(again)


class Streamed(IterableDataset):
    """Examples without end and without a length."""

    def __iter__(self) -> Any:
        _, tokenizer = world.load()
        while True:
            yield from EditDataset(world.edits(n=12)).encode(tokenizer)


class Epochs(TrainerCallback):
    """Raise an error if a run begins many epochs, because it would never end."""

    def __init__(self) -> None:
        self.begun = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun += 1
        assert self.begun < 5


def test_a_streaming_data_set_is_trained_and_a_run_that_is_resumed_at_its_last_step_ends(tmp_path: Path) -> None:
    def train_streamed(**options: Any) -> tuple[Any, Trainer]:
        model, tokenizer = world.load()
        args = TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False, learning_rate=1e-3,
        )  # fmt: skip
        used: list[Any] = [ParameterScope(layers=-1), TokenLoss(), Epochs()]
        trainer = Trainer(model, args, collator(tokenizer), Streamed(), callbacks=used)
        trainer.train(**options)
        return model, trainer

    model, _ = train_streamed()
    name = "model.layers.5.mlp.down_proj.weight"
    assert not torch.equal(weights(model)[name], weights(world.load()[0])[name])
    again, trainer = train_streamed(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert_same_bits(weights(model), weights(again))


def test_resuming_a_loop_from_its_last_checkpoint_ends_the_edit(tmp_path: Path) -> None:
    model, again = world.load()[0], world.load()[0]
    state = loop(model, range(2))
    loop(again, range(2, 2), state, [SaveDelta(str(tmp_path / "edit.safetensors"))])
    assert_same_bits(weights(model), weights(again))
    assert_clean(again)
    assert EditDelta.load(tmp_path / "edit.safetensors").meta["configuration"]["step"] == 2


@pytest.mark.slow
def test_resuming_from_the_last_checkpoint_ends_the_edit(tmp_path: Path) -> None:
    model = world.load()[0]
    train(model, tmp_path, callbacks())
    again, delta = world.load()[0], tmp_path / "edit.safetensors"
    train(again, tmp_path, [*callbacks(), SaveDelta(str(delta))], resume=True)
    assert_same_bits(weights(model), weights(again))
    assert_clean(again)
    assert delta.exists()
