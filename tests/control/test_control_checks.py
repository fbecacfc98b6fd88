"""``controlled``: what it refuses, and its warnings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from control.small_models import HIDDEN, VOCAB, build
from transformers import MambaConfig, MambaForCausalLM

from kedit_train.control import ValueModel, controlled
from kedit_train.control.value import describe_model
from kedit_train.errors import EditError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": -1}, "controlled: step_size must be >= 0, got -1."),
        ({"step_size": 1, "steps": 1.5}, "controlled: steps must be an integer >= 0, got 1.5."),
        ({"step_size": 1, "radius": float("nan")}, "controlled: radius must be >= 0, got nan."),
        (
            {"step_size": 1, "layers": [0]},
            "controlled: layers must be among the layers of the value function (head, 1), got 0",
        ),
        (
            {"step_size": 1, "layers": [3]},
            'each item of layers must be "head" or an index from -3 to 2, got 3.',
        ),
        (
            {"step_size": 1, "layers": "head"},
            "layers must be a non-empty list, got 'head'; pass a list, for example",
        ),
        (
            {"step_size": 1, "layers": [1, -2]},
            "layers must contain each layer only once, got [1, -2]; remove",
        ),
        ({"step_size": 1, "first_token": 1}, "controlled: first_token must be True or False, got 1."),
    ],
)
def test_a_bad_argument_is_an_error_in_one_line(options: dict[str, Any], message: str, value: ValueModel) -> None:
    with pytest.raises(EditError) as error, controlled(build(), value, **options):
        pass
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 250


def test_a_value_function_of_another_model_and_something_else_are_refused() -> None:
    other = ValueModel(["head"], hidden_size=4)
    with pytest.raises(EditError, match="hidden states of size 16, got 4"), controlled(build(), other, step_size=1):
        pass
    wrong: Any = torch.nn.Linear(2, 2)
    with pytest.raises(EditError, match="value must be a ValueModel"), controlled(build(), wrong, step_size=1):
        pass


def test_a_model_without_a_key_value_cache_is_refused(value: ValueModel) -> None:
    model: Any = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4))
    message = "^controlled: MambaForCausalLM.forward must have an argument for a key-value cache, but has none"
    with pytest.raises(EditError, match=message), controlled(model, value, step_size=1):
        pass


def test_a_value_function_of_a_deeper_model_is_named_as_the_cause() -> None:
    deeper = ValueModel(["head", "15"], hidden_size=16)
    message = "^controlled: value was trained on another model: .* for layer 15, but this model has 3 layers; use the "
    with pytest.raises(EditError, match=message), controlled(build(), deeper, step_size=1):
        pass


@pytest.mark.parametrize("layers", [[], "head", ["a.b"], ["head", "head"], ["-1"], None, 2])
def test_the_layers_of_a_value_function_are_checked(layers: Any) -> None:
    with pytest.raises(EditError, match=r"^ValueModel: layers must be a list of different layers, each .head. or the "):
        ValueModel(layers, hidden_size=4)


def test_a_value_function_of_other_weights_is_a_warning(tmp_path: Path, value: ValueModel) -> None:
    model = build()
    value.trained_on = describe_model(model)
    saved = ValueModel.load(value.save(tmp_path / "value.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (model, build(dtype=torch.bfloat16)):
            with controlled(same, saved, step_size=1):
                pass
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with (
        pytest.warns(UserWarning, match="controlled: the value function was trained on another model or on other weig"),
        controlled(model, saved, step_size=1),
    ):
        pass
