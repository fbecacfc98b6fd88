"""Gradients that are not finite, parameters that are replaced, and a scope that is frozen are errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.small_loop import model, sgd, train

from kedit_train.callbacks import GradientMask, NormBall, ParameterScope, editing
from kedit_train.errors import EditError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("callback", [NormBall(1e-3), GradientMask("magnitude", density=0.5)])
def test_a_gradient_that_is_not_finite_is_an_error(value: float, callback: Any) -> None:
    net = model()

    def spoil(number: int) -> None:
        if number == 1:
            net[1].weight.register_hook(lambda gradient: torch.full_like(gradient, value))

    with pytest.raises(EditError, match=r"^the gradient of 1\.weight contains NaN or infinite values at step 2; lower"):
        train(net, [ParameterScope(modules="1"), callback], sgd, 3, spoil)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_still_skips_infinite_gradients(fused: bool) -> None:
    net = model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with editing(net, [ParameterScope(modules="1"), NormBall(1e-1)]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1, fused=fused)
        for number in range(3):
            optimizer.zero_grad()
            edit.before_step(scaler)
            loss = net(torch.ones(2, 4)).square().sum()
            scaler.scale(loss * (1e38 if number == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert edit.run.step == 2


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("name", ["1.weight", "0.weight"])
def test_parameters_that_are_replaced_are_an_error(name: str, at_the_end: bool) -> None:
    net = model()

    def replace(number: int) -> None:
        if number == 2:
            module = net.get_submodule(name[0])
            module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)

    with pytest.raises(EditError, match=rf"^{name} was replaced by another object.*load_state_dict\(assign=True\)"):
        train(net, [ParameterScope(modules="1"), NormBall(1e-3)], sgd, 3 if at_the_end else 6, replace)


def test_a_scope_that_is_frozen_during_the_run_is_an_error() -> None:
    for at in (0, 1):
        net = model()

        def freeze(number: int, net: Any = net, at: int = at) -> None:
            if number == at:
                net.requires_grad_(False)

        with pytest.raises(EditError, match=rf"^no parameter in scope can be trained at step {at + 1}.*1\.weight"):
            train(net, [ParameterScope(modules="1")], sgd, 2, freeze)
