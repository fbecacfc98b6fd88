"""What a checkpoint stores about an edit, without a trainer around it."""

from __future__ import annotations

import pytest
import torch

from kedit_train import EditError
from kedit_train.callbacks import NormBall, ParameterScope, editing
from kedit_train.core.resume import checkpoint_state, restore


@pytest.fixture
def run():
    with editing(torch.nn.Linear(3, 2), [NormBall(0.1)]) as edit:
        edit.before_step()
        yield edit.run
        edit.run.close()


def test_a_state_restores_the_step_and_the_reference_weights(run):
    state = checkpoint_state(run)
    state["step"] = 7
    state["reference"]["weight"] = torch.full((2, 3), 5.0)
    restore(run, state)
    assert run.step == 7
    assert run.reference["weight"].eq(5.0).all()


@pytest.mark.parametrize("version", [None, 1, 3])
def test_a_state_of_another_version_is_an_error(run, version):
    state = checkpoint_state(run)
    state["format"] = version
    with pytest.raises(EditError, match="written by another version of kedit-train"):
        restore(run, state)


def test_a_checkpoint_without_a_state_is_an_error(run):
    with pytest.raises(EditError, match="the weights before the edit are unknown"):
        restore(run, None)


DAMAGED = {
    "no dict": lambda state: None,
    "a list": lambda state: [1],
    "empty": lambda state: {},
    "step": lambda state: state | {"step": "x"},
    "negative step": lambda state: state | {"step": -5},
    "no callbacks": lambda state: {name: value for name, value in state.items() if name != "callbacks"},
    "no reference": lambda state: {name: value for name, value in state.items() if name != "reference"},
    "no tensors": lambda state: state | {"reference": {"weight": 1}},
    "shape": lambda state: state | {"reference": {name: value[:1] for name, value in state["reference"].items()}},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_state_is_one_line_in_a_plain_loop(damage):
    model = torch.nn.Linear(3, 2, bias=False)
    with editing(model, [NormBall(0.1)]) as edit:
        edit.before_step()
        state = edit.state_dict()
    with editing(model, [NormBall(0.1)]) as edit:
        with pytest.raises(EditError, match=r"edit\.state_dict|another version|is damaged|of shape") as error:
            edit.load_state_dict(damage(state))
        edit.load_state_dict(state)
    assert "\n" not in str(error.value)


def test_changed_frozen_weights_are_an_error_when_a_run_resumes():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    with editing(model, [ParameterScope(modules="1"), NormBall(0.1)]) as edit:
        edit.before_step()
        state = edit.state_dict()
    assert set(state["checksums"]["frozen"]) == {"0.weight", "0.bias"}
    model[0].weight.data[[0, 1]] = model[0].weight.data[[1, 0]]
    with editing(model, [ParameterScope(modules="1"), NormBall(0.1)]) as edit:
        edit.load_state_dict(state)
        with pytest.raises(EditError, match=r"^0\.weight is not trained .* its values differ .*the same base model"):
            edit.before_step()
        edit.run.close()


def test_other_weights_in_scope_are_an_error_in_every_loop(run):
    state = checkpoint_state(run)
    run.model.weight.data.add_(1.0)
    with pytest.raises(EditError, match=r"must have the weights of the checkpoint.*kedit_state\.safetensors"):
        restore(run, state)
    # Version 0.2.0 did not save the checksums.
    del state["checksums"]
    restore(run, state)
