"""The next optimizer step is an error if the loop has abandoned the run, or does not announce steps to the run."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from conformance.hosts import ARGUMENTS, HOSTS, Rows, collator
from transformers import Trainer, TrainerCallback, TrainingArguments

from kedit_train import world
from kedit_train.callbacks import EditMetrics, KLLocality, ParameterScope, TokenSmoothing, editing
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError

TEXTS = ["The old baker found a coin near the river.", "A red fox slept."]


def trainer(model: Any, callbacks: list[Any], **extra: Any) -> Trainer:
    tokenizer = world.load()[1]
    arguments = TrainingArguments(output_dir=tempfile.mkdtemp(), max_steps=3, **ARGUMENTS)
    arguments.remove_unused_columns = False
    rows = Rows(EditDataset(world.edits(n=8)).encode(tokenizer))
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
        **extra,
    )


class Interrupt(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_trainer_after_an_interrupted_edit_trains_an_ordinary_model() -> None:
    model, _ = world.load()
    first = trainer(model, [ParameterScope(layers=2), TokenSmoothing(), Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(model, []).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_trainer_after_an_edit_that_never_trained_gets_an_error_and_the_model_is_released() -> None:
    model, _ = world.load()
    trainer(model, [ParameterScope(layers=2), TokenSmoothing()])
    with pytest.raises(EditError, match="belongs to an edit that another trainer set up and did not finish"):
        trainer(model, []).train()
    assert all(p.requires_grad for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(model, []).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_made_by_model_init_is_the_one_that_is_edited() -> None:
    made: list[Any] = []

    def init() -> Any:
        made.append(world.load()[0])
        return made[-1]

    built = trainer(None, [ParameterScope(layers=2, modules="mlp"), TokenSmoothing()], model_init=init)
    built.train()
    base = dict(world.load()[0].named_parameters())
    moved = {name for name, p in made[-1].named_parameters() if not torch.equal(p, base[name])}
    assert moved == {name for name in base if "layers.2.mlp" in name}
    assert all(p.requires_grad for model in made for p in model.parameters())


def test_a_step_that_was_not_announced_is_an_error() -> None:
    model, tokenizer = world.load()
    batch = collator(tokenizer)(EditDataset(world.edits(n=4)).encode(tokenizer))
    with editing(model, [ParameterScope(layers=2), TokenSmoothing()], tokenizer=tokenizer) as edit:
        optimizer = torch.optim.AdamW(edit.parameters())
        model(**batch).loss.backward()
        with pytest.raises(EditError, match=r"an optimizer stepped without edit.before_step\(\)"):
            optimizer.step()
    assert all(p.requires_grad for p in model.parameters())


def test_an_edit_longer_than_the_context_is_named() -> None:
    model, tokenizer = world.load()
    long = EditDataset([*world.edits(n=1), Edit(prompt="word " * 300 + "is", target="long", id="e7")])
    with pytest.raises(EditError, match="edit 2 \\(id 'e7'\\)"):
        long.encode(tokenizer)
    with pytest.raises(EditError, match="edit 2 \\(id 'e7'\\)"):
        HOSTS["SFTTrainer"](model, tokenizer, long, [EditMetrics(long, show=False)], 1)


@pytest.mark.filterwarnings("ignore:2 training steps began, but no optimizer")
def test_a_step_that_a_scaler_left_out_does_not_cost_the_next_its_penalty() -> None:
    model, tokenizer = world.load()
    with editing(model, [KLLocality(texts=TEXTS, batch_size=1)], tokenizer=tokenizer) as edit:
        edit.before_step()
        assert edit.run.steps.penalty() is None
        edit.run.steps.begin()
        assert edit.run.steps.penalty() is not None
