"""ForgetFirst: arguments, lists of callbacks and adapters that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from callbacks.forgetting import EDITS, TEXTS, scope

from kedit_train import EditError, world
from kedit_train.callbacks import ForgetFirst, ForgetTraining, ParameterScope, editing


@pytest.fixture
def loaded() -> Any:
    return world.load()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ({"coefficients": [0.0]}, "a list of at least one finite number > 0"),
        ({"coefficients": []}, "a list of at least one finite number > 0"),
        ({"scale": "both"}, '"base" or "trained"'),
        ({"max_probability": 1.0}, "in (0, 1)"),
        ({"max_perplexity_ratio": 0.9}, ">= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(argument, expected) -> None:
    ((name, value),) = argument.items()
    with pytest.raises(EditError) as error:
        ForgetFirst(TEXTS, **argument)
    assert str(error.value) == f"ForgetFirst: {name} must be {expected}, got {value!r}."


def test_the_training_may_be_a_mapping_as_in_yaml() -> None:
    assert ForgetFirst(TEXTS, training={"epochs": 3}).training == ForgetTraining(epochs=3)
    with pytest.raises(EditError, match=r"^ForgetTraining: epochs must be an integer >= 1, got 0"):
        ForgetFirst(TEXTS, training={"epochs": 0})


@pytest.mark.parametrize(
    ("make_callbacks", "message"),
    [
        (
            lambda: [ForgetFirst(TEXTS, edits=EDITS)],
            r"ForgetFirst: the run needs a scope \(the parameters that may change\)",
        ),
        (lambda: [scope(), ForgetFirst(TEXTS)], "ForgetFirst: edits must be given, .* has no edits of its own"),
        (lambda: [scope(), ForgetFirst("nowhere.txt", edits=EDITS)], "ForgetFirst: .*nowhere.txt"),
        (
            lambda: [scope(), *(ForgetFirst(TEXTS, edits=EDITS) for _ in range(2))],
            "ForgetFirst: there are two callbacks of this class on this model; keep one ForgetFirst and pass all",
        ),
    ],
)
def test_a_list_of_callbacks_that_cannot_work_is_refused(loaded, make_callbacks, message) -> None:
    model, tokenizer = loaded
    callbacks = make_callbacks()
    with pytest.raises(EditError, match=message) as error, editing(model, callbacks, tokenizer=tokenizer) as edit:
        edit.before_step()
    assert "\n" not in str(error.value)


def test_adapters_are_refused(loaded) -> None:
    peft = pytest.importorskip("peft")
    model, _ = loaded
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    callbacks = [ParameterScope(modules="*"), ForgetFirst(TEXTS, edits=EDITS)]
    match = "ForgetFirst: the model must not have adapters"
    with pytest.raises(EditError, match=match), editing(adapted, callbacks):
        raise AssertionError("entered")
