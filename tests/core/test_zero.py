"""The steps of a ZeRO optimizer, on an optimizer that keeps a flat copy of the weights as DeepSpeed does.

``tests/conformance/test_zero.py`` uses DeepSpeed itself.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kedit_train.callbacks import EditCallback, GradientMask, NormBall, ParameterScope, editing
from kedit_train.core.zero import zero_optimizer
from kedit_train.errors import EditError


class FlatOptimizer:
    """Updates a flat copy of the parameters, and takes each gradient in a hook on its parameter."""

    dtype, cpu_offload = torch.float32, False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.bit16_groups = [group["params"] for group in optimizer.param_groups]
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in self.bit16_groups[0]]))
        self.optimizer = optimizer
        optimizer.param_groups[0]["params"] = [self.flat]
        self.averaged_gradients: dict[int, Any] = {0: None}
        self.all_grad_tensors: dict[int, Any] = {0: None}
        self.taken: dict[int, Tensor] = {}
        self.parts: dict[int, Tensor] = {}
        start = 0
        for parameter in self.bit16_groups[0]:
            self.parts[id(parameter)] = self.flat.data[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
            self._hook(parameter)

    def _hook(self, parameter: Any) -> None:
        def take(_: Tensor) -> None:
            self.taken[id(parameter)] = self.taken.get(id(parameter), 0.0) + parameter.grad
            self.averaged_gradients[0] = self.taken
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(take)
        parameter._hp_mapping = None
        parameter.get_full_hp_grad = MethodType(lambda p: self.taken[id(p)], parameter)
        parameter.set_full_hp_param = MethodType(lambda p, value: self.parts[id(p)].copy_(value), parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.taken.clear()

    def step(self) -> None:
        self.flat.grad = torch.cat([self.taken[id(p)].flatten() for p in self.bit16_groups[0]])
        self.optimizer.step()
        for parameter in self.bit16_groups[0]:
            parameter.data.copy_(self.parts[id(parameter)])
        self.taken.clear()


class Pull(EditCallback):
    """Adds a penalty, and skips the second step if ``skip`` is True."""

    penalizes = True

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip

    def penalty(self, run: Any) -> Tensor | None:
        return None if self.skip else sum(p.square().sum() for p in run.scope.values())

    @property
    def skips(self) -> bool:
        return self.skip

    def skip_step(self, run: Any) -> bool:
        return self.skip and run.step == 1


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 2))


def trained(
    flat: bool, *callbacks: Any, often: bool = False, **attributes: Any
) -> tuple[nn.Module, Any, list[dict[str, float]]]:
    """Train two layers for three steps of two micro-batches. ``often`` announces each step before each micro-batch."""
    network, zero = model(), None
    mask = GradientMask("magnitude", density=0.5)
    with editing(network, [ParameterScope(modules=("0", "2")), *callbacks, mask], log_every_n_steps=1) as edit:
        optimizer: Any = torch.optim.AdamW(edit.parameters(), lr=0.1, weight_decay=0.1)
        if flat:
            optimizer = zero = FlatOptimizer(optimizer)
            vars(zero).update(attributes)
        for step in range(3):
            edit.before_step()
            for part in range(2):
                if often:
                    edit.before_step()
                inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * step + part))
                network(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return network, zero, edit.history


@pytest.mark.parametrize("skip", [False, True])
def test_the_weights_and_metrics_are_those_of_an_ordinary_optimizer(skip: bool) -> None:
    expected, _, rows = trained(False, NormBall(0.15), Pull(skip))
    found, zero, others = trained(True, NormBall(0.15), Pull(skip))
    before = dict(model().named_parameters())
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
        if name[0] in "02":
            assert not torch.equal(parameter, before[name]), name
            assert torch.equal(zero.parts[id(parameter)], parameter), name
    assert others == rows
    assert all(len(p._post_accumulate_grad_hooks or ()) == (n[0] in "02") for n, p in found.named_parameters())
    assert zero.step == FlatOptimizer.step.__get__(zero)


def test_a_penalty_counts_once_if_each_micro_batch_announces_the_step() -> None:
    once, often = trained(True, Pull()), trained(True, Pull(), often=True)
    for name, parameter in once[0].named_parameters():
        assert torch.equal(parameter, often[0].get_parameter(name)), name


def test_a_parameter_that_deepspeed_does_not_train_is_an_error() -> None:
    network = model()
    with editing(network, [ParameterScope(modules=("0", "2"))]) as edit:
        FlatOptimizer(torch.optim.SGD(network[0].parameters(), lr=0.1))
        with pytest.raises(EditError, match=r"2\.weight is in scope, but the optimizer of DeepSpeed does not train it"):
            edit.before_step()


def test_the_optimizer_is_found_only_by_its_own_hooks() -> None:
    network = model()
    assert zero_optimizer(dict(network.named_parameters())) is None
    network[0].weight.register_post_accumulate_grad_hook(lambda _: None)
    assert zero_optimizer(dict(network.named_parameters())) is None
    zero = FlatOptimizer(torch.optim.SGD(network[0].parameters(), lr=0.1))
    assert zero_optimizer(dict(network.named_parameters())) is zero


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"dtype": torch.bfloat16}, "the DeepSpeed config enables bf16 or fp16"),
        ({"cpu_offload": True}, "keeps the optimizer on the CPU"),
    ],
)
def test_copies_in_half_precision_and_offloading_are_refused(attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(EditError, match=why):
        trained(True, **attributes)


def test_a_penalty_without_a_gradient_of_the_loss_is_an_error() -> None:
    network = model()
    with editing(network, [ParameterScope(modules=("0", "2")), Pull()]) as edit:
        zero = FlatOptimizer(torch.optim.SGD(edit.parameters(), lr=0.1))
        edit.before_step()
        network[0](torch.ones(1, 5)).sum().backward()
        with pytest.raises(
            EditError, match=r"must also get a gradient .*, got none for 2\.weight; call edit\.before_step"
        ):
            zero.step()
