"""Updates without an optimizer step, changes outside of the scope, and NaN or infinite values are errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.small_loop import Penalty, model, sgd, step, train
from torch import nn

from kedit_train import world
from kedit_train.callbacks import EditCallback, GradientMask, NormBall, ParameterScope, editing
from kedit_train.errors import EditError


class HandWritten:
    """An optimizer that is not a torch.optim.Optimizer."""

    def __init__(self, parameters: list[nn.Parameter], through_data: bool) -> None:
        self.parameters, self.through_data = parameters, through_data

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            # Writing through .data does not change the version counter.
            (parameter.data if self.through_data else parameter).sub_(0.1 * parameter.grad)


class FusedBackward:
    """An optimizer that updates each parameter during the backward pass, as LOMO does."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.update)

    def update(self, parameter: torch.Tensor) -> None:
        parameter.data.sub_(0.1 * parameter.grad)
        parameter.grad = None

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


@pytest.mark.parametrize("kind", ["through .data", "in place", "during the backward pass"])
def test_updates_that_no_hook_reports_are_an_error_at_the_next_step(kind: str) -> None:
    makers: dict[str, Any] = {
        "through .data": lambda parameters: HandWritten(parameters, True),
        "in place": lambda parameters: HandWritten(parameters, False),
        "during the backward pass": FusedBackward,
    }
    with pytest.raises(EditError, match=r"after step 0 although no optimizer step was detected"):
        train(model(), [ParameterScope(modules="1"), NormBall(1e-3)], makers[kind], 2)


def test_a_single_unseen_update_is_an_error_at_the_end() -> None:
    net = model()
    with pytest.raises(EditError, match="the constraints were not enforced"):
        train(net, [ParameterScope(modules="1"), NormBall(1e-3)], lambda p: HandWritten(p, True), 1)
    assert all(p.requires_grad for p in net.parameters())


def test_a_skipped_step_is_no_error() -> None:
    net = model()
    with editing(net, [ParameterScope(modules="1"), NormBall(1e-3)]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for taken in (True, False, False, True, False):
            optimizer.zero_grad()
            edit.before_step()
            net(torch.ones(2, 4)).square().sum().backward()
            if taken:
                optimizer.step()
    assert edit.run.step == 2


@pytest.mark.parametrize("gradient", [1.0, 0.0])
def test_gradients_from_before_the_edit_move_nothing_outside_the_scope(gradient: float) -> None:
    net = model()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    with editing(net, [ParameterScope(modules="1")]) as edit:
        for _ in range(2):
            edit.before_step()
            net(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert {name for name, p in net.named_parameters() if not torch.equal(p, before[name])} == {"1.weight"}


def test_unfreezing_during_the_run_is_an_error_before_the_step() -> None:
    net = model()
    before = net[2].weight.detach().clone()

    def unfreeze(number: int) -> None:
        net[2].requires_grad_(number > 0)

    with pytest.raises(EditError, match=r"2\.weight is not in scope, but has a gradient at step 2.*ParameterScope"):
        train(net, [ParameterScope(modules="1")], lambda _: sgd(net.parameters()), 2, unfreeze)
    assert torch.equal(net[2].weight, before)


def test_unfreezing_before_the_first_step_is_an_error() -> None:
    net = model()

    def make(parameters: Any) -> Any:
        net.requires_grad_(True)
        return sgd(net.parameters())

    with pytest.raises(
        EditError, match=r"0\.weight is not in scope, but its requires_grad is True before the first step"
    ):
        train(net, [ParameterScope(modules="1")], make, 1)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_deleting_the_gradients_of_a_penalty_is_an_error(set_to_none: bool) -> None:
    net = model()
    with editing(net, [ParameterScope(modules="1"), Penalty()]) as edit:
        optimizer = sgd(edit.parameters())
        step(edit, net, optimizer)
        edit.before_step()
        optimizer.zero_grad(set_to_none=set_to_none)
        net(torch.ones(2, 4)).square().sum().backward()
        with pytest.raises(EditError, match="the gradients of the penalties were deleted"):
            optimizer.step()


def test_gradients_of_a_penalty_may_be_accumulated() -> None:
    net = model()
    with editing(net, [ParameterScope(modules="1"), Penalty()]) as edit:
        optimizer = sgd(edit.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(3):
                edit.before_step()
                net(torch.ones(2, 4)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(edit.parameters(), 0.1)
            optimizer.step()
    assert edit.run.step == 2


def test_frozen_values_that_change_are_an_error_at_the_first_step() -> None:
    net = model()

    def change(parameters: Any) -> Any:
        # The weights have been recorded before the forward pass, so a change in a forward hook is detected.
        def write(*_: Any) -> None:
            net[0].weight.data[0, 0] += 1e-6

        net[1].register_forward_hook(write)
        return sgd(parameters)

    with pytest.raises(EditError, match=r"^0\.weight is not in scope, but its values have changed before step 2"):
        train(net, [ParameterScope(modules="1")], change, 1)


def test_a_change_of_frozen_values_after_the_first_step_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedit_train.core.integrity.ENTRIES_PER_STEP", 1)
    net, begun = model(), []

    def change(number: int) -> None:
        begun.append(number)
        if number == 2:
            net[2].bias.data.add_(1.0)

    with pytest.raises(EditError, match=r"^2\.bias is not in scope, but its values have changed"):
        train(net, [ParameterScope(modules="1")], sgd, 8, change)
    # The four frozen parameters are compared in turn.
    assert 3 <= len(begun) <= 6


def test_deepspeed_is_named_as_the_cause() -> None:
    net = model()
    with editing(net, [ParameterScope(modules="1")]) as edit:
        net[1].weight._hp_mapping = object()
        with pytest.raises(EditError, match="DeepSpeed updates flattened copies of the weights; use DDP, FSDP2"):
            edit.before_step()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_an_error_that_names_the_step_and_the_parameter(value: float) -> None:
    class Breaks(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:
            super().step()
            if self.steps == 1:
                self.param_groups[0]["params"][0].data[:] = value
            self.steps += 1

    callbacks = [ParameterScope(modules="1"), GradientMask("magnitude", density=0.5)]
    with pytest.raises(EditError, match=r"^1\.weight contains NaN or infinite values after step 2; lower the"):
        train(model(), callbacks, lambda parameters: Breaks(parameters, lr=0.1), 3)


class Wraps(torch.optim.Optimizer):
    """An optimizer that wraps another optimizer, as ZeroRedundancyOptimizer does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimizer_inside_another_one_counts_once() -> None:
    class Counts(EditCallback):
        constrains, calls = True, 0

        def constrain(self, weights: Any, reference: Any) -> Any:
            self.calls += 1
            return weights

    net, counts = model(), Counts()
    with editing(net, [ParameterScope(modules="1"), counts]) as edit:
        optimizer = Wraps(torch.optim.SGD(edit.parameters(), lr=0.1))
        for _ in range(3):
            step(edit, net, optimizer)
        assert edit.run.step == 3
        assert counts.calls == 3


def test_a_compiled_model_can_be_edited() -> None:
    model, tokenizer = world.load()
    compiled: Any = torch.compile(model, backend="eager")
    ids = torch.arange(8).unsqueeze(0)
    callbacks = [ParameterScope(layers="3", modules="mlp.down_proj"), NormBall(1e-3)]
    with editing(compiled, callbacks, tokenizer=tokenizer) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        for _ in range(2):
            edit.before_step()
            compiled(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert list(edit.run.scope) == ["model.layers.3.mlp.down_proj.weight"]
    before = world.load()[0].model.layers[3].mlp.down_proj.weight
    assert 0 < (model.model.layers[3].mlp.down_proj.weight - before).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaving_a_run_changes_no_bit_of_a_model_in_its_own_precision(dtype: torch.dtype) -> None:
    class Last(EditCallback):
        order = 99

        def after_step(self, run: Any) -> None:
            self.weights = {name: p.detach().clone() for name, p in run.scope.items()}

    net, last = model().to(dtype), Last()
    scope = ParameterScope(modules="1", full_precision=False)
    with editing(net, [scope, NormBall(1e-3, norm="l2"), last]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            edit.before_step()
            net(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
            optimizer.step()
    assert torch.equal(net[1].weight, last.weights["1.weight"])
