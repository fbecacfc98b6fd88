"""WeightAnchor: L2-SP compared with its formula computed by hand, and the arguments that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from callbacks.weight_anchor_inputs import DOWN, move
from conformance.hosts import HOSTS
from torch import nn

from kedit_train import world
from kedit_train.callbacks import EditCallback, GradientMask, ParameterScope, WeightAnchor, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def two_equal_models() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decoupled_l2sp_is_independent_of_the_optimizer_and_follows_its_schedule(name):
    model, plain = two_equal_models()
    start = copy.deepcopy(model)
    x = torch.randn(8, 3)
    with editing(model, [WeightAnchor(strength=0.7)], log_every_n_steps=1) as edit:
        anchored_optimizer, plain_optimizer = (
            OPTIMIZERS[name](p) for p in (edit.parameters(), list(plain.parameters()))
        )
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (anchored_optimizer, plain_optimizer)]
        rate = 0.1
        for step in range(4):
            edit.before_step()
            model(x).square().mean().backward()
            anchored_optimizer.step()
            plain(x).square().mean().backward()
            plain_optimizer.step()
            with torch.no_grad():
                for w, w0 in zip(plain.parameters(), start.parameters(), strict=True):
                    w.copy_(w - rate * 0.7 * (w - w0))
            for w, expected in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)
            distance = sum(
                float((w - w0).detach().square().sum())
                for w, w0 in zip(plain.parameters(), start.parameters(), strict=True)
            )
            assert edit.history[step]["edit/drift/anchor"] == pytest.approx(0.7 / 2 * distance, rel=1e-4)
            for schedule in schedules:
                schedule.step()
            for optimizer in (anchored_optimizer, plain_optimizer):
                optimizer.zero_grad()
            rate *= 0.5
    assert distance > 1e-3


def test_l2sp_in_the_loss_is_the_papers_penalty_and_counts_once_when_gradients_accumulate():
    model, plain = two_equal_models()
    start = copy.deepcopy(model)
    x = torch.randn(8, 3)
    with editing(model, [WeightAnchor(strength=0.7, decoupled=False)]) as edit:
        optimizers = [torch.optim.SGD(p, lr=0.2) for p in (edit.parameters(), list(plain.parameters()))]
        for _ in range(3):
            edit.before_step()
            for part in x.split(2):
                (model(part).square().mean() / 4).backward()
            penalty = sum((w - w0.detach()).square().sum() for w, w0 in
                          zip(plain.parameters(), start.parameters(), strict=True))  # fmt: skip
            (plain(x).square().mean() + 0.7 / 2 * penalty).backward()
            for w, expected in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(w.grad, expected.grad, rtol=1e-5, atol=1e-7)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert not torch.equal(model[0].weight, start[0].weight)


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_pulls_after_each_step_with_the_learning_rate_of_that_step(host):
    """The learning rate is 1e-3, so a strength of 1,000 undoes every step and a strength of 500 undoes half of it."""
    drift = {}
    for strength in (0.0, 500.0, 1000.0):
        model, tokenizer = world.load()
        edits = EditDataset(world.edits(n=8))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        callbacks = [WeightAnchor(strength=strength), ParameterScope(0.5, modules="down_proj")]
        HOSTS[host](model, tokenizer, edits, callbacks, 1)
        drift[strength] = sum(float((p.detach() - before[n]).norm()) for n, p in model.named_parameters())
    assert drift[0.0] > 0.05
    assert drift[500.0] == pytest.approx(drift[0.0] / 2, rel=1e-4)
    assert drift[1000.0] < 1e-5


@pytest.mark.filterwarnings("ignore:other code has changed")
def test_a_weight_that_was_not_stepped_is_not_pulled():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    a, b = model["a"].weight, model["b"].weight
    with editing(model, [WeightAnchor(strength=1.0)]) as edit:
        first, second = torch.optim.SGD([a], lr=0.5), torch.optim.SGD([b], lr=0.25)
        edit.before_step()
        start = {"a": a.detach().clone(), "b": b.detach().clone()}
        with torch.no_grad():
            a.add_(1.0)
            b.add_(1.0)
        (0.0 * a.sum()).backward()
        first.step()
        torch.testing.assert_close(a, start["a"] + 0.5)
        assert torch.equal(b, start["b"] + 1.0), "another optimizer steps it"
        first.zero_grad()
        second.step()
        assert torch.equal(b, start["b"] + 1.0), "it has no gradient"
        edit.before_step()
        first.step()
        torch.testing.assert_close(a, start["a"] + 0.5)
        (0.0 * b.sum()).backward()
        second.step()
        torch.testing.assert_close(b, start["b"] + 0.75)


def test_half_precision_weights_are_pulled_in_fp32_and_rounded_once():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    with editing(model, [WeightAnchor(strength=0.3)]) as edit:
        edit.before_step()
        start = model.weight.detach().clone()
        move(edit, 0.01)
        moved = model.weight.detach().float()
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        (0.0 * model.weight.sum()).backward()
        optimizer.step()
        assert torch.equal(model.weight, (moved - 0.3 * (moved - start.float())).bfloat16())


def test_a_mask_holds_exactly_after_the_anchor(make, words, ids):
    model = make()
    before = model.get_parameter(DOWN).detach().clone()
    mask = GradientMask("random", density=0.1)
    with editing(
        model, [mask, WeightAnchor(strength=0.5), ParameterScope(1, modules="down_proj")], tokenizer=words
    ) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.1)
        for _ in range(3):
            edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        same = model.get_parameter(DOWN).view(torch.int32) == before.view(torch.int32)
        assert bool(same[mask.state()["frozen"][DOWN]].all())
        assert not bool(same.all())


class Projection(EditCallback):
    """Records the weights that it is asked to project."""

    order, constrains = 40, True
    weights: Any = None

    def constrain(self, weights, reference):
        self.weights = {name: weight.clone() for name, weight in weights.items()}
        return weights


def test_the_anchor_is_applied_before_projections():
    model = nn.Linear(2, 2, bias=False)
    projection = Projection()
    with editing(model, [projection, WeightAnchor(strength=1.0)]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.5)
        edit.before_step()
        start = model.weight.detach().clone()
        model.weight.sum().backward()
        optimizer.step()
        torch.testing.assert_close(projection.weights["weight"], start - 0.25)


def test_optimizers_without_a_learning_rate_and_rates_that_overshoot_are_refused():
    from transformers import Adafactor

    def step(make_optimizer: Any, anchor: WeightAnchor) -> None:
        model = nn.Linear(3, 3)
        with editing(model, [anchor]) as edit:
            optimizer = make_optimizer(edit.parameters())
            edit.before_step()
            model(torch.randn(2, 3)).square().sum().backward()
            optimizer.step()

    def relative(parameters: Any) -> Any:
        return Adafactor(parameters, lr=None, relative_step=True, scale_parameter=True)

    with pytest.raises(EditError, match=r"^WeightAnchor: the decoupled update after each step needs a learning rate"):
        step(relative, WeightAnchor())
    step(relative, WeightAnchor(decoupled=False))
    with pytest.raises(
        EditError,
        match=r"^WeightAnchor: learning rate \* strength must be <= 1, got 0.5 \* 4, which would move 'weight'",
    ):
        step(lambda p: torch.optim.SGD(p, lr=0.5), WeightAnchor(strength=4.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "l1"}, 'kind must be "l2sp", "ewc" or "kfac", got \'l1\''),
        ({"strength": -1.0}, "strength must be >= 0, or None, got -1.0"),
        ({"strength": float("nan")}, "strength must be >= 0, or None, got nan"),
        ({"anchor": "first"}, 'anchor must be "base" or "previous", got \'first\''),
        ({"limit": 0}, "limit must be an integer >= 1, or None, got 0"),
        ({"kind": "ewc"}, "kind='ewc' needs texts="),
        ({"texts": ["a"]}, "kind='l2sp' does not use texts="),
        ({"kind": "ewc", "texts": ["a"], "decoupled": True}, "decoupled must be None or False if kind='ewc'"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(EditError) as error:
        WeightAnchor(**arguments)
    assert str(error.value).startswith(f"WeightAnchor: {message}")
