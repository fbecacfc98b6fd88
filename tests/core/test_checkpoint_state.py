"""What a checkpoint stores about an edit, without a trainer around it."""

from __future__ import annotations

import pytest
import torch

from kedit_train import EditError
from kedit_train.callbacks import NormBall, editing
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
