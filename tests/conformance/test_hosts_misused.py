"""Unusual uses of a Trainer: another checkpoint, a callback that is listed twice, removed, or added late."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import ARGUMENTS, Rows, collator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kedit_train import world
from kedit_train.callbacks import EditCallback, KLLocality, NormBall, NullSpace, ParameterScope, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

TEXTS = ["The old baker found a coin near the river.", "A red fox slept."]
NAME = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def edits() -> EditDataset:
    return EditDataset(world.edits(n=8))


def scope() -> ParameterScope:
    return ParameterScope(layers=3, modules="mlp.down_proj")


def trainer(folder: Path, edits: EditDataset, callbacks: list[Any], *, shift: float = 0.0, **extra: Any) -> Trainer:
    model, tokenizer = world.load()
    with torch.no_grad():
        model.get_parameter(NAME).add_(shift)
    arguments = TrainingArguments(**({"output_dir": str(folder), "max_steps": 4} | ARGUMENTS | extra))
    arguments.remove_unused_columns = False
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(edits.encode(tokenizer)),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def saving(folder: Path, edits: EditDataset, **extra: Any) -> Trainer:
    made = trainer(folder, edits, [scope(), NormBall(1e-3)], save_strategy="steps", save_steps=2, **extra)
    made.train()
    return made


def test_a_resumed_run_takes_the_reference_from_its_own_checkpoint(tmp_path, edits):
    saving(tmp_path / "a", edits)
    saving(tmp_path / "b", edits, shift=0.05)
    # The output folder has a checkpoint of the same step of another edit.
    resumed = trainer(tmp_path / "b", edits, [scope(), NormBall(1e-3)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    before = world.load()[0].get_parameter(NAME)
    moved = resumed.model.get_parameter(NAME).detach().double() - before.detach().double()
    assert 0.0 < float(moved.abs().max()) <= 1e-3
    # After the folder was moved, the file of this edit cannot be found.
    (tmp_path / "a").rename(tmp_path / "c")
    lost = trainer(tmp_path / "b", edits, [scope(), NormBall(1e-3)])
    with pytest.raises(EditError, match="contains no state of this edit"):
        lost.train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-2"))


def test_resuming_with_other_constraints_is_an_error_or_a_warning(tmp_path, edits):
    saving(tmp_path, edits)
    without = trainer(tmp_path, edits, [scope()])
    with pytest.raises(EditError, match=r"was written with NormBall\(.* which this run does not use"):
        without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wider = trainer(tmp_path, edits, [scope(), NormBall(1e-2)])
    with pytest.warns(UserWarning, match=r"resumed with NormBall\(.*, but the checkpoint was written with NormBall"):
        wider.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_same_callback_twice_in_a_list_is_an_error(tmp_path, edits):
    twice = scope()
    with pytest.raises(EditError, match="the same instance is twice in the trainer's callbacks"):
        trainer(tmp_path, edits, [twice, NormBall(1e-3), twice])


def test_removing_a_callback_before_training_is_an_error(tmp_path, edits):
    kept = KLLocality(TEXTS)
    made = trainer(tmp_path, edits, [scope(), kept])
    made.remove_callback(kept)
    with pytest.raises(EditError, match=r"KLLocality: this callback was removed from the trainer"):
        made.train()
    assert all(p.requires_grad for p in made.model.parameters())


def test_removing_a_callback_during_training_is_an_error(tmp_path, edits):
    ball = NormBall(1e-3)

    class Removes(EditCallback):
        def after_step(self, run: Any) -> None:
            made.remove_callback(ball)

    made = trainer(tmp_path, edits, [scope(), ball, Removes()])
    with pytest.raises(EditError, match=r"NormBall: this callback was removed from the trainer"):
        made.train()
    assert all(p.requires_grad for p in made.model.parameters())


def test_callbacks_may_be_added_later_in_any_order(tmp_path, edits):
    made = trainer(tmp_path, edits, [])
    made.add_callback(NullSpace(TEXTS))
    made.add_callback(scope())
    made.train()
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, world.load()[0].get_parameter(n))}
    assert moved == {NAME}


@pytest.mark.parametrize("reading", ["lm_head.modules_to_save.default.weight", "lm_head.*lora_A.*"])
def test_the_inputs_of_a_wrapped_head_are_read_in_full(reading: str):
    peft = pytest.importorskip("peft")
    model, tokenizer = world.load()
    wrapped = {"modules_to_save": ["lm_head"]} if "modules_to_save" in reading else {}
    targets = ["down_proj"] if wrapped else ["down_proj", "lm_head"]
    model.config.tie_word_embeddings = False
    if not wrapped and model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **wrapped))
    space = NullSpace(TEXTS, energy=0.5, batch_size=1)
    with editing(model, [ParameterScope(modules=reading), space], tokenizer=tokenizer) as edit:
        edit.before_step()
        (free,) = space._projection.subspaces.values()
        seen = []

        def watch(module: nn.Module, args: Any) -> None:
            seen.append(args[0].detach().reshape(-1, args[0].shape[-1]))

        head = model.get_base_model().lm_head
        handle = head.register_forward_pre_hook(watch)
        with torch.no_grad():
            for text in TEXTS:
                model(**tokenizer(text, return_tensors="pt"))
        handle.remove()
        rows = torch.cat(seen)
        _, _, directions = torch.linalg.svd(rows.double(), full_matrices=False)
        # The basis spans either the preserved or the free directions. In both cases, these four directions are
        # preserved.
        inside = (directions[:4] @ free.basis.double()).norm() / 4**0.5
        assert float(inside) == pytest.approx(1.0 if free.preserved else 0.0, abs=1e-3)


def test_a_copied_trainer_trains_its_own_model(tmp_path: Path, edits: EditDataset) -> None:
    given = trainer(tmp_path, edits, [scope(), NormBall(1e-3)], max_steps=1)
    before = given.model.get_parameter(NAME).detach().clone()
    copied = copy.deepcopy(given)
    copied.train()
    assert torch.equal(given.model.get_parameter(NAME), before)
    assert 0 < (copied.model.get_parameter(NAME) - before).abs().max() <= 1.0001e-3
    given.train()
    assert torch.equal(given.model.get_parameter(NAME), copied.model.get_parameter(NAME))


class WritesAtTheEnd(TrainerCallback):
    """Write to a weight when training ends, like a callback that copies averaged weights into the model."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.get_parameter(self.name).data.add_(1.0)


AFTER_THE_END = r"has changed {} after the edit had ended.*put this callback before the callbacks of kedit_train"


@pytest.mark.parametrize("name", [NAME, "model.norm.weight"])
def test_a_callback_that_writes_weights_at_the_end_of_a_trainer_is_one_warning(tmp_path, edits, name):
    used = [scope(), NormBall(1e-3), WritesAtTheEnd(name)]
    with pytest.warns(UserWarning, match=AFTER_THE_END.format(re.escape(name))) as found:
        trainer(tmp_path, edits, used, max_steps=1).train()
    assert len([w for w in found if "after the edit" in str(w.message)]) == 1


def test_a_trainer_with_callbacks_inside_an_editing_block_is_an_error(tmp_path, edits):
    made = trainer(tmp_path, edits, [])
    with editing(made.model, [scope(), NormBall(1e-3)]):
        problem = (
            "^KLLocality: this model can be in only one edit at a time, but an edit with ParameterScope, NormBall has"
        )
        with pytest.raises(EditError, match=problem):
            Trainer(model=made.model, args=made.args, callbacks=[KLLocality(TEXTS)])


def test_an_editing_block_in_a_callback_of_a_trainer_is_an_error(tmp_path, edits):
    class Nests(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with editing(model, [NormBall(1e-4)]):
                pass

    with pytest.raises(
        EditError, match=r"^NormBall: this model can be in only one edit at a time.*ParameterScope, NormBall"
    ):
        trainer(tmp_path, edits, [scope(), NormBall(1e-3), Nests()], max_steps=1).train()


def test_a_wrong_checkpoint_restores_the_flags_and_the_trainer_can_be_used_again(tmp_path, edits):
    saving(tmp_path, edits)
    made = trainer(tmp_path, edits, [scope(), NormBall(1e-3)])
    for wrong in ("does_not_exist", "neither"):
        with pytest.raises(ValueError, match="checkpoint"):
            made.train(wrong)
        assert all(p.requires_grad for p in made.model.parameters())
    made.train(str(tmp_path / "checkpoint-2"))
    assert made.state.global_step == 4
    before = world.load()[0]
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {NAME}
    assert all(p.requires_grad for p in made.model.parameters())


def test_weights_of_a_checkpoint_that_failed_to_load_are_not_the_weights_before_the_edit(tmp_path, edits, monkeypatch):
    def load(made: Any, *_: Any) -> None:
        made.model.get_parameter(NAME).data.add_(1.0)
        raise FileNotFoundError

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", load)
    made = trainer(tmp_path, edits, [scope(), NormBall(1e-3)])
    with pytest.raises(FileNotFoundError):
        made.train("checkpoint-2")
    with pytest.raises(EditError, match=rf"{NAME} must not change between the start of the edit and the first step"):
        made.train()


def test_deepspeed_of_accelerate_launch_is_refused(tmp_path, edits):
    made = trainer(tmp_path, edits, [scope(), NormBall(1e-3)])
    # TrainingArguments sets this attribute if the variable ACCELERATE_USE_DEEPSPEED is set.
    made.args.deepspeed_plugin = object()
    with pytest.raises(EditError, match="cannot be enforced with this training strategy: DeepSpeed"):
        made.train()
