"""A run decides once whether targets end with end-of-text, says so in one line, and the report repeats it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conformance.hosts import ARGUMENTS, labels_of
from endless import endless
from trl import SFTConfig, SFTTrainer

from kedit_train import EditSFTConfig, EditSFTTrainer, run_edits, world
from kedit_train.callbacks import EditMetrics, ParameterScope
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.modes import ExampleOptions, TrainLoop
from kedit_train.modules import EditDataModule, EditModule

SCOPE = {"layers": 0.9, "modules": "mlp.down_proj"}
ON = "append_eos: on, because the unedited model ends"
OFF = "append_eos: off, because the unedited model ends only 0% of its completions by itself"


def metrics_of(edits: Any = None) -> EditMetrics:
    return EditMetrics(edits, every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=2))


def said(metrics: EditMetrics) -> str:
    assert metrics.report is not None
    return metrics.report.meta["append_eos"]


@pytest.mark.parametrize(("ends", "line"), [(True, ON), (False, OFF)])
def test_lightning(ends: bool, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, data, metrics = EditModule(), EditDataModule(limit=2), metrics_of()
    if not ends:
        endless(module.model, module.tokenizer)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False}
    L.Trainer(callbacks=[ParameterScope(**SCOPE), metrics], **options).fit(module, datamodule=data)
    assert capsys.readouterr().err.count(line) == 1
    assert said(metrics).startswith(line)
    batch = next(iter(data.train_dataloader()))
    assert bool((batch["labels"] == module.tokenizer.eos_token_id).any()) == ends


@pytest.mark.parametrize(("ends", "line"), [(True, ON), (False, OFF)])
def test_edit_sft_trainer(ends: bool, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = world.load()
    if not ends:
        endless(model, tokenizer)
    edits = EditDataset.load("world", limit=2)
    arguments = {**ARGUMENTS, "max_steps": 1, "edit_metrics": {"show": False, "every_n_steps": 0}}
    args = EditSFTConfig(str(tmp_path), **arguments, parameter_scope=SCOPE)
    trainer = EditSFTTrainer(model, args=args, edits=edits, processing_class=tokenizer)
    trainer.train()
    assert capsys.readouterr().err.count(line) == 1
    assert str(trainer.answer_end).startswith(line)
    assert said(next(c for c in trainer.callback_handler.callbacks if isinstance(c, EditMetrics))).startswith(line)
    expected = edits.to_tokens(tokenizer, append_eos=ends)
    rows = list(trainer.train_dataset)
    assert [row["input_ids"] for row in rows] == expected["input_ids"]
    assert [labels_of(row) for row in rows] == expected["labels"]


def test_edit_sft_trainer_takes_the_decision_and_refuses_packing(tmp_path: Path) -> None:
    model, tokenizer = world.load()
    edits = EditDataset.load("world", limit=2)
    args = EditSFTConfig(str(tmp_path), **ARGUMENTS, parameter_scope=SCOPE, append_eos="false")
    trainer = EditSFTTrainer(model, args=args, edits=edits, processing_class=tokenizer)
    assert trainer.train_dataset["input_ids"] == edits.to_tokens(tokenizer, append_eos=False)["input_ids"]
    with pytest.raises(
        EditError, match=r'^EditSFTConfig: append_eos must be "auto", "true" or "false", got \'perhaps\''
    ):
        EditSFTConfig(str(tmp_path), **ARGUMENTS, append_eos="perhaps")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = EditSFTConfig(str(tmp_path), **ARGUMENTS, parameter_scope=SCOPE, append_eos=False, packing=True)
        with pytest.raises(EditError, match=r"^EditSFTTrainer: packing must be False if the targets do not end with"):
            EditSFTTrainer(model, args=args, edits=edits, processing_class=tokenizer)


def sft(folder: Path, data: Any, metrics: EditMetrics, model: Any, tokenizer: Any) -> None:
    args = SFTConfig(str(folder), **(ARGUMENTS | {"max_steps": 1}))
    callbacks = [ParameterScope(**SCOPE), metrics]
    SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks).train()


def test_the_end_of_text_of_trl_is_a_warning_if_the_model_does_not_end(tmp_path: Path) -> None:
    edits = EditDataset.load("world", limit=2)
    model, tokenizer = world.load()
    endless(model, tokenizer)
    with pytest.warns(UserWarning, match=r"^EditMetrics: the training examples end with end-of-text, but .* only 0%"):
        sft(tmp_path, edits.to_prompt_completion(), metrics := metrics_of(edits), model, tokenizer)
    assert said(metrics) == "append_eos: on, as in the training examples"
    metrics = metrics_of(edits)
    sft(tmp_path, edits.to_tokens(tokenizer, model=model), metrics, model, tokenizer)
    assert said(metrics) == "append_eos: off, as in the training examples"


def test_a_loop_decides_once_and_on_all_edits(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = world.load()
    edits = EditDataset.load("world", limit=2)
    for setting, line in (("auto", OFF), (True, "append_eos: on, because append_eos=True was set")):
        train = TrainLoop(tokenizer, epochs=1, examples=ExampleOptions(append_eos=setting))
        options = EvaluationOptions(max_new_tokens=2)
        endless(model, tokenizer)
        result = run_edits(model, tokenizer, edits, mode="sequential", train=train, options=options, progress=False)
        assert result.meta["append_eos"] == line.removeprefix("append_eos: ")
        assert capsys.readouterr().err.count("append_eos") == (setting == "auto")


def test_a_loop_trains_what_it_trained_before() -> None:
    edits, trained = EditDataset.load("world", limit=3), []
    for setting in ("auto", True):
        torch.manual_seed(0)
        model, tokenizer = world.load()
        TrainLoop(tokenizer, epochs=2, examples=ExampleOptions(append_eos=setting))(model, edits)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
