"""Optimizers that step in hooks of the backward pass raise a one-line EditError, not an error of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from core.small_loop import Penalty, model, sgd, step
from torch import nn

from kedit_train.callbacks import EditCallback, NormBall, ParameterScope, editing
from kedit_train.errors import EditError


def in_hooks(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        optimizer = sgd([parameter])
        parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: hook(optimizer))


def hook(optimizer: Any) -> None:
    optimizer.step()
    optimizer.zero_grad()


def of_torch(parameters: Sequence[nn.Parameter]) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, parameters, {"lr": 0.1})


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("install", [in_hooks, of_torch])
@pytest.mark.parametrize("callback", [NormBall(1e-3), NormBall(1e-3, norm="l2", per="scope"), Penalty()], ids=repr)
def test_an_optimizer_that_steps_in_the_backward_pass_is_one_line(
    callback: EditCallback, install: Callable[..., None]
) -> None:
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with (  # noqa: PT012
        pytest.raises(EditError, match=r"^SGD\.step\(\) was called inside backward\(\).*its step\(\) after") as error,
        editing(net, [ParameterScope(modules="*"), callback]) as edit,
    ):
        install(edit.parameters())
        edit.before_step()
        net(torch.ones(2, 4)).square().sum().backward()
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_scope_alone_allows_an_optimizer_in_the_backward_pass() -> None:
    net = model()
    with editing(net, [ParameterScope(modules=["1", "2"])]) as edit:
        in_hooks(edit.parameters())
        for _ in range(3):
            edit.before_step()
            net(torch.ones(2, 4)).square().sum().backward()
    assert edit.run.step == 3


def test_a_backward_pass_inside_of_a_closure_is_allowed() -> None:
    """A closure calls backward() inside of step(), which is the opposite order."""
    net = model()
    with editing(net, [ParameterScope(modules="1"), NormBall(1e-3)]) as edit:
        optimizer = sgd(edit.parameters())
        edit.before_step()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = net(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        step(edit, net, optimizer)
    assert edit.run.step == 2
