"""Teachers: how they are named, and which ones cannot be compared with the edited model."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kedit_train.core.locality.teacher import Teacher, load_teacher, teacher_head
from kedit_train.errors import EditError


def run_of(model: nn.Module) -> Any:
    return SimpleNamespace(language_model=model)


def test_a_teacher_is_made_from_a_name_a_module_or_a_mapping():
    module = nn.Linear(1, 1)
    assert Teacher.of("some/model") == Teacher("some/model", top_k=256)
    assert Teacher.of(module).model is module
    assert Teacher.of({"model": "some/model", "top_k": 8}) == Teacher("some/model", top_k=8)
    assert Teacher.of(Teacher("a")) == Teacher("a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "a", "top_k": 0}, "Teacher: top_k must be an integer >= 1, got 0."),
        ({"model": "a", "k": 3}, "Teacher: unknown argument 'k'; use only model, top_k."),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(EditError) as error:
        Teacher.of(options)
    assert str(error.value) == message


def test_a_module_without_a_tokenizer_is_compared_by_the_size_of_its_vocabulary(tiny):
    model, teacher = tiny("llama"), tiny("gpt2")
    assert load_teacher(teacher, run_of(model), None) == (teacher, 61)
    with pytest.raises(EditError, match="has another vocabulary than the edited model"):
        load_teacher(tiny("gpt2", vocab_size=77), run_of(model), None)


def test_models_that_cannot_teach_are_refused(tiny):
    model = tiny("llama")
    for teacher, message in (
        (nn.Linear(2, 2), "teacher must be a causal language model, got Linear without a language-model head"),
        (model, "teacher must not be the edited model itself"),
        ("no/such/folder/here", "teacher cannot be loaded from 'no/such/folder/here'"),
    ):
        with pytest.raises(EditError, match=message):
            load_teacher(teacher, run_of(model), None)


def test_a_head_that_cannot_be_verified_leaves_no_hook(tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EditError):
        teacher_head(model, torch.device("cpu"), nullcontext())
    assert not model.lm_head._forward_pre_hooks
