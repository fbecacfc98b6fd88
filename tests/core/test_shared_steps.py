"""Several optimizers after one call of ``before_step()`` take one step together."""

from __future__ import annotations

from typing import Any

import torch
from core.small_loop import Penalty, model

from kedit_train.callbacks import EditCallback, ParameterScope, editing


class Recorder(EditCallback):
    """Records the step at which ``after_step`` is called, and what was trained by then."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def after_step(self, run: Any) -> None:
        self.steps.append(run.step)
        self.weights.append({name: p.detach().clone() for name, p in run.scope.items()})


def test_several_optimizers_that_share_an_announcement_take_one_step() -> None:
    net, recorder = model(), Recorder()
    with editing(net, [ParameterScope(modules=["1", "2"]), recorder], log_every_n_steps=1) as edit:
        optimizers = [torch.optim.SGD([p], lr=0.1) for p in edit.parameters()]
        for _ in range(4):
            edit.before_step()
            net(torch.ones(2, 4)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert len(optimizers) == 3
    assert edit.run.step == 4
    assert recorder.steps == [1, 2, 3, 4]
    # The callbacks are called when the last optimizer has stepped.
    assert all(torch.equal(value, edit.run.scope[name]) for name, value in recorder.weights[-1].items())


def test_a_step_that_updates_a_part_of_the_scope_is_complete_when_the_next_one_is_announced() -> None:
    net, recorder = model(), Recorder()
    with editing(net, [ParameterScope(modules=["1", "2"]), recorder]) as edit:
        optimizer = torch.optim.SGD(edit.parameters()[:1], lr=0.1)
        for steps in ([], [1], [1, 2]):
            edit.before_step()
            assert recorder.steps == steps
            net(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
    assert recorder.steps == [1, 2, 3]


def test_penalties_of_a_shared_step_survive_until_the_last_optimizer() -> None:
    class SkippingPenalty(Penalty):
        def skip_step(self, run: Any) -> bool:
            return True

    net = model()
    before = net[2].weight.detach().clone()
    with editing(net, [ParameterScope(modules=["1", "2"]), SkippingPenalty()]) as edit:
        optimizers = [torch.optim.SGD([p], lr=0.1) for p in edit.parameters()]
        edit.before_step()
        net(torch.ones(2, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(net[2].weight, before)
