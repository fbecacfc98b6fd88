"""Text edits of a vision-language model: training loops, refused callbacks, evaluation and files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import ARGUMENTS
from vision_models import (
    IMAGES,
    PICTURE,
    SCOPE,
    TEXTS,
    batch_of,
    bits,
    build_model,
    changed,
    picture,
    scope,
    train,
)

from kedit_train import EditDelta, EditError, load_model
from kedit_train.callbacks import (
    ActiveSet,
    BatchAnchor,
    ContextTeacher,
    EditMetrics,
    GradientMask,
    KLLocality,
    LowCurvature,
    MaskScore,
    NormBall,
    NullSpace,
    PolyakStep,
    PrefixCache,
    SaveDelta,
    SecondOrderLocality,
    SubjectTokens,
    TokenLoss,
    TokenSmoothing,
    WeightAnchor,
)
from kedit_train.evaluation import EvaluationOptions, generate_answers

# -- hosts


SETTINGS: dict[str, Callable[[Any], list[Any]]] = {
    "SubjectTokens, NullSpace": lambda edits: [SubjectTokens(edits=edits), NullSpace(TEXTS), TokenLoss("overtone")],
    "KLLocality, NormBall": lambda edits: [KLLocality(TEXTS, batch_size=2), NormBall(1e-3), TokenSmoothing()],
    "SecondOrderLocality": lambda edits: [SecondOrderLocality(TEXTS, batch_size=2), TokenSmoothing()],
    "LowCurvature": lambda edits: [LowCurvature(TEXTS, batch_size=2), TokenLoss("dft")],
    "ActiveSet": lambda edits: [ActiveSet(recheck=1), TokenSmoothing()],
    "WeightAnchor": lambda edits: [WeightAnchor("ewc", strength=100.0, texts=TEXTS), PolyakStep(), TokenSmoothing()],
    "GradientMask": lambda edits: [GradientMask(MaskScore("gradient", limit=4), density=0.2, edits=edits)],
    "ContextTeacher": lambda edits: [ContextTeacher(edits, min_followed=0.0)],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_only_the_scope_moves_in_a_loop(model, processor, edits, name):
    before = bits(model)
    train(model, processor, batch_of(processor, edits, IMAGES), [scope(), *SETTINGS[name](edits)])
    assert changed(model, before) == SCOPE


def trainer_arguments(folder: Path) -> dict[str, Any]:
    return ARGUMENTS | {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "remove_unused_columns": False,
    }


def run_trainer(model: Any, processor: Any, edits: Any, callbacks: list[Any], folder: Path) -> list[Any]:
    from transformers import Trainer, TrainingArguments

    rows = list(zip(edits, IMAGES, strict=True))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(folder)),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=lambda rows: batch_of(processor, *zip(*rows, strict=True)),
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.state.log_history


def run_sft(model: Any, processor: Any, edits: Any, callbacks: list[Any], folder: Path) -> list[Any]:
    from datasets import Dataset, Image, Sequence
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "prompt": f"{PICTURE if has_image else ''}{edit.prompt}",
            "completion": f" {edit.target}",
            "images": [picture(i)] if has_image else [],
        }
        for i, (edit, has_image) in enumerate(zip(edits, IMAGES, strict=True))
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**trainer_arguments(folder), max_length=None),
        # datasets 3.0 does not recognize images in a list by itself.
        train_dataset=Dataset.from_list(rows).cast_column("images", Sequence(Image())),
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.state.log_history


HOSTS = {"Trainer": run_trainer, "SFTTrainer": run_sft}


def losses(history: list[Any]) -> list[float]:
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.parametrize("host", HOSTS)
def test_the_loss_of_a_trainer_does_not_change(processor, edits, host, tmp_path):
    """TokenLoss with cross-entropy gives the losses and weights that the trainer has without it."""
    runs = []
    for own in ([], [TokenLoss()]):
        model = build_model(processor.tokenizer)
        runs.append((losses(HOSTS[host](model, processor, edits, [scope(), *own], tmp_path)), model))
    (stock, first), (own, second) = runs
    assert len(stock) == 3
    assert own == pytest.approx(stock, rel=1e-4)
    for name in SCOPE:
        torch.testing.assert_close(second.get_parameter(name), first.get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("host", HOSTS)
def test_an_edit_in_a_trainer(processor, edits, host, tmp_path):
    model = build_model(processor.tokenizer)
    untouched, before, path = copy.deepcopy(model), bits(model), tmp_path / "edit.safetensors"
    callbacks = [
        *(scope(), TokenLoss("overtone"), SubjectTokens(), KLLocality(TEXTS, batch_size=2), NullSpace(TEXTS)),
        EditMetrics(edits, every_n_steps=2, show=False, evaluation=EvaluationOptions(max_new_tokens=4)),
        SaveDelta(str(path), edits=edits),
    ]
    history = HOSTS[host](model, processor, edits, callbacks, tmp_path)
    assert changed(model, before) == SCOPE
    assert any("edit/locality/kl" in row for row in history)
    assert any("edit/reliability" in row for row in history)
    delta = EditDelta.load(path)
    applied = delta.apply(untouched)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in applied.named_parameters())
    assert bits(delta.revert(applied)).keys() == before.keys()
    assert changed(applied, before) == []


# -- what is refused


REFUSED: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "PrefixCache": (
        lambda: [PrefixCache()],
        "PrefixCache: Qwen2_5_VLTextModel calls the layers but does not receive the input_ids of the model, so "
        "PrefixCache cannot identify the sequences; remove PrefixCache.",
    ),
    "BatchAnchor": (
        lambda: [BatchAnchor(), TokenLoss()],
        "BatchAnchor: the model is called with pixel_values of shape (48, 24) for 4 examples, but this argument must "
        "have one entry per example; remove the argument, or use KLLocality with texts.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_before_the_first_step(model, processor, edits, name):
    callbacks, message = REFUSED[name]
    before = bits(model)
    with pytest.raises(EditError) as error:
        train(model, processor, batch_of(processor, edits, IMAGES), [scope(), *callbacks()])
    assert str(error.value) == message
    assert changed(model, before) == []


# -- evaluation and files


def test_answers_after_a_batch_with_images(model, processor, edits):
    """The model keeps the positions of the last image. They must not reach the prompts of an evaluation."""
    model.eval()
    prompts = [edit.prompt for edit in edits]
    model(**batch_of(processor, edits, IMAGES))
    answers = generate_answers(model, processor.tokenizer, prompts, max_new_tokens=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([processor.tokenizer(prompt)["input_ids"]])
        for expected in answer.ids:
            assert int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()) == expected
            ids = torch.cat([ids, torch.tensor([[expected]])], dim=1)
    assert any(answer.ids for answer in answers)


def test_a_delta_is_applied_to_a_checkpoint(model, processor, edits, tmp_path):
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "edit.safetensors"
    train(model, processor, batch_of(processor, edits, IMAGES), [scope(), SaveDelta(str(path), edits=edits)])
    EditDelta.load(path).apply_to_checkpoint(tmp_path / "base", tmp_path / "edited")
    again = type(model).from_pretrained(tmp_path / "edited")
    assert bits(again).keys() == bits(model).keys()
    assert changed(again, bits(model)) == []


def test_load_model_loads_the_vision_tower(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    assert bits(loaded).keys() == bits(model).keys()
    assert changed(loaded, bits(model)) == []
    assert len(tokenizer) == len(processor.tokenizer)
