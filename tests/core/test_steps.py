"""Optimizer steps with closures, and several callbacks of one class on one model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kedit_train.callbacks import (
    EditCallback,
    GradientMask,
    LowCurvature,
    NormBall,
    NullSpace,
    ParameterScope,
    editing,
)
from kedit_train.errors import EditError


class Pull(EditCallback):
    penalizes = True

    def penalty(self, run):
        return next(iter(run.scope.values())).square().sum()


class Idle(EditCallback):
    def skip_step(self, run):
        return False


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 4)) - 1).square().sum()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("callback", [Pull, Idle])
def test_a_closure_is_an_error_if_a_callback_needs_the_gradients_before_the_step(callback):
    model = nn.Linear(4, 4)
    with editing(model, [callback()]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        edit.before_step()
        with pytest.raises(EditError, match=r"step\(closure\).*without a closure"):
            optimizer.step(closure_of(model, optimizer))


def test_a_step_with_a_closure_must_be_announced():
    model = nn.Linear(4, 4)
    with editing(model, [NormBall()]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        with pytest.raises(EditError, match="before_step"):
            optimizer.step(closure_of(model, optimizer))


def test_constraints_hold_with_lbfgs():
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    held = GradientMask(score="random", density=0.5)
    with editing(model, [held, NormBall(0.01)]) as edit:
        optimizer = torch.optim.LBFGS(edit.parameters(), lr=1.0, max_iter=5)
        for _ in range(3):
            edit.before_step()
            optimizer.step(closure_of(model, optimizer))
        moved = model.weight.detach().view(torch.int32) != before.view(torch.int32)
        assert 0 < int(moved.sum()) <= 8
        assert float((model.weight.detach() - before).abs().max()) <= 0.01


@pytest.mark.parametrize(
    "kind", [lambda: ParameterScope(modules="*"), lambda: NullSpace("world"), lambda: LowCurvature("world")]
)
def test_a_second_callback_of_a_class_that_allows_one_is_an_error(kind):
    model = nn.Linear(4, 4)
    first = kind()
    # prepare() may raise another error for this model, so it is replaced.
    first.prepare = second_prepare = lambda run: None
    second = kind()
    second.prepare = second_prepare
    with (
        pytest.raises(EditError, match=f"{type(first).__name__}: there are two callbacks of this class on this model"),
        editing(model, [first, second]),
    ):
        pass
    assert not hasattr(model, "_kedit_run")


def test_callbacks_of_one_class_log_under_numbered_keys():
    class One(EditCallback):
        def metrics(self, run):
            return {"edit/locality/kl": 1.0}

    with editing(nn.Linear(2, 2), [One(), One(), One()]) as edit:
        assert set(edit.run.collect()) == {"edit/locality/kl", "edit/locality/kl#2", "edit/locality/kl#3"}
