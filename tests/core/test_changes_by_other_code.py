"""Modules, flags, dtypes and weights that other code changes during a run: errors or warnings, never silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.small_loop import Penalty, model, sgd, step, train
from torch import nn

from kedit_train.callbacks import EditCallback, NormBall, ParameterScope, editing
from kedit_train.errors import EditError

ADDED = r"was added to the model after training had begun.*add modules and adapters before the edit"


@pytest.mark.parametrize("same_optimizer", [True, False])
def test_a_module_that_is_added_and_trained_is_an_error_at_its_step(same_optimizer: bool) -> None:
    net = model()
    with (  # noqa: PT012
        pytest.raises(EditError, match=rf"^extra\.weight {ADDED}"),
        editing(net, [ParameterScope(modules="1")]) as edit,
    ):
        optimizer = sgd(edit.parameters())
        step(edit, net, optimizer)
        net.add_module("extra", nn.Linear(3, 3))
        before = net.extra.weight.detach().clone()
        if same_optimizer:
            optimizer.add_param_group({"params": list(net.extra.parameters())})
            step(edit, net, optimizer)
        else:
            sgd(net.extra.parameters()).step()
    assert torch.equal(net.extra.weight, before)


def test_a_module_that_is_added_without_an_optimizer_is_an_error_at_the_end() -> None:
    net = model()
    with pytest.raises(EditError, match=ADDED):
        train(net, [ParameterScope(modules="1")], sgd, 2, lambda n: n and net.add_module("extra", nn.Linear(3, 3)))


def test_an_optimizer_of_another_model_may_step() -> None:
    net, other = model(), nn.Linear(2, 2)
    optimizer = sgd(other.parameters())

    def train_other(number: int) -> None:
        other(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    assert train(net, [ParameterScope(modules="1")], sgd, 2, train_other).run.step == 2


def test_freezing_a_part_of_the_scope_during_the_run_is_an_error() -> None:
    net = model()
    with pytest.raises(EditError, match=r"^2\.weight is in scope, but other code has set its requires_grad to False"):
        train(net, [ParameterScope(modules=["1", "2"])], sgd, 3, lambda n: net[2].weight.requires_grad_(n < 1))


def test_converting_the_model_during_the_run_is_an_error() -> None:
    net = model()
    with pytest.raises(
        EditError, match=r"^1\.weight was converted from torch\.float32 to torch\.bfloat16 before step 2"
    ):
        train(net, [ParameterScope(modules="1")], sgd, 2, lambda n: n and net.to(torch.bfloat16))


@pytest.mark.parametrize("callbacks", [[], [NormBall(0.5)]])
def test_writing_to_the_scope_after_a_step_is_one_warning(callbacks: list[Any]) -> None:
    net = model()

    def write(number: int) -> None:
        if number:
            net[1].weight.data[0, 0] += 1e-3

    with pytest.warns(
        UserWarning, match=r"other code has changed 1\.weight .* outside of the optimizer steps"
    ) as found:
        train(net, [ParameterScope(modules="1"), *callbacks], sgd, 4, write)
    assert len(found) == 1


def test_writing_to_the_scope_between_before_step_and_the_optimizer_step_is_one_warning() -> None:
    net = model()

    def write(*_: Any) -> None:
        with torch.no_grad():
            net[0].weight[0, 0] += 1e-3

    # This hook is called after before_step() and before the optimizer step.
    net[0].weight.register_post_accumulate_grad_hook(write)
    with pytest.warns(
        UserWarning, match=r"other code has changed 0\.weight .* outside of the optimizer steps"
    ) as found:
        train(net, [ParameterScope(modules="0"), NormBall(0.5)], sgd, 3)
    assert len(found) == 1


@pytest.mark.filterwarnings("error")
def test_values_that_a_callback_restores_within_a_step_give_no_warning() -> None:
    net = model()
    with editing(net, [ParameterScope(modules="1"), Penalty()]) as edit:
        optimizer = sgd(edit.parameters())
        for _ in range(2):
            edit.before_step()
            with edit.run.reference_model():
                net(torch.ones(2, 4))
            net(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_loop_that_loads_its_best_weights_at_the_end_gives_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    best = net[1].weight.detach().clone()
    with editing(net, [ParameterScope(modules="1"), NormBall(0.5)]) as edit:
        monkeypatch.setattr(type(edit.run.host), "loads_best_weights", True)
        step(edit, net, sgd(edit.parameters()))
        net[1].weight.data.copy_(best)
    assert torch.equal(net[1].weight, best)


def interrupt(net: nn.Module, *callbacks: EditCallback) -> None:
    with editing(net, [ParameterScope(modules="1"), *callbacks]) as edit:
        step(edit, net, sgd(edit.parameters()))
        raise KeyboardInterrupt


def test_another_model_with_the_parameters_of_an_interrupted_edit_is_an_error() -> None:
    net = model()
    base = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        interrupt(net)
    # PEFT also puts the modules of a model into another model.
    other = nn.Sequential(net[0], nn.Sequential(net[1]), net[2])
    with pytest.raises(EditError, match="contains 1 steps of an edit that was interrupted"):
        train(other, [ParameterScope(modules="2")], sgd, 1)
    net.load_state_dict(base)
    assert train(other, [ParameterScope(modules="2")], sgd, 1).run.step == 1
    net.load_state_dict(base)
    assert train(net, [ParameterScope(modules="2")], sgd, 1).run.step == 1


def test_a_scope_on_the_meta_device_is_one_line() -> None:
    net = model()
    net[1].to("meta")
    with pytest.raises(EditError, match=r"^ParameterScope: 1\.weight is on the meta device.*without device_map"):
        train(net, [ParameterScope(modules="1")], sgd, 1)


def test_weights_that_are_loaded_between_the_start_of_the_edit_and_its_first_step_are_an_error() -> None:
    net, other = model(), {name: value + 1 for name, value in model().state_dict().items()}
    with (  # noqa: PT012
        pytest.raises(EditError, match=r"^1\.weight must not change between the start .*edit\.load_state_dict"),
        editing(net, [ParameterScope(modules="1"), NormBall(1e-3)]) as edit,
    ):
        net.load_state_dict(other)
        step(edit, net, sgd(edit.parameters()))
    assert torch.equal(net[1].weight, other["1.weight"])
    with (  # noqa: PT012
        pytest.raises(EditError, match=r"^0\.weight is not in scope, but its values have changed between the start"),
        editing(net, [ParameterScope(modules="1"), NormBall(1e-3)]) as edit,
    ):
        net[0].weight.data.mul_(1.5)
        step(edit, net, sgd(edit.parameters()))
    net.load_state_dict(other)
    # Loading equal values is not a change. Without ParameterScope, the edit has no copy of the weights to compare.
    train(net, [ParameterScope(modules="1")], sgd, 1, lambda n: net.load_state_dict(other))
    train(net, [NormBall(1e-3)], sgd, 1, lambda n: net.load_state_dict(model().state_dict()))


def test_steps_of_an_optimizer_without_a_parameter_in_scope_are_one_warning() -> None:
    net = model()
    copies = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    with pytest.warns(UserWarning, match=r"2 training steps began, but no optimizer .* edit\.parameters\(\)") as found:
        train(net, [ParameterScope(modules="1"), NormBall(0.5)], lambda _: sgd(copies), 2)
    assert len(found) == 1
