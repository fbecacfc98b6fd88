"""NullSpace, then a ball, then a mask: which constraint stays exact, and how much of the others is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, WEIGHT, adamw, train
from torch import Tensor

from kedit_train.callbacks import EditCallback, NormBall, NullSpace, ParameterScope, editing

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 w21 w22 w23"]
NAME = WEIGHT["llama"]


class Mask(EditCallback):
    """Every second entry keeps its reference value, as with GradientMask."""

    order = 48
    constrains = True

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.where(masked(w), reference[n], w) for n, w in weights.items()}


def masked(weight: Tensor) -> Tensor:
    return (torch.arange(weight.numel()) % 2 == 0).reshape(weight.shape)


def edited(make: Any, words: Any, ids: Tensor, *callbacks: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return the weight before and after training, and the last metrics."""
    torch.manual_seed(0)
    model = make("llama")
    before = model.get_parameter(NAME).detach().clone()
    scope = ParameterScope(1, modules=SCOPE["llama"])
    with editing(model, [*callbacks, scope], tokenizer=words, log_every_n_steps=1) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    return before, model.get_parameter(NAME).detach(), edit.history[-1]


def distance(before: Tensor, after: Tensor) -> float:
    return float((after.double() - before.double()).norm())


def test_an_l2_ball_keeps_the_null_space(make, words, ids):
    free = distance(*edited(make, words, ids, NullSpace(TEXTS))[:2])
    for radius in (0.5 * free, 0.1 * free):
        before, after, metrics = edited(make, words, ids, NormBall(radius, norm="l2"), NullSpace(TEXTS))
        assert 0.99 * radius < distance(before, after) <= radius
        assert metrics["edit/drift/null_space_leak"] < 1e-5


def test_clipping_keeps_it_only_approximately_and_the_metric_reports_the_leak(make, words, ids):
    before, after, _ = edited(make, words, ids, NullSpace(TEXTS))
    largest = float((after - before).abs().max())
    leaks = []
    for radius in (2.0 * largest, 0.5 * largest, 0.02 * largest):
        before, after, metrics = edited(make, words, ids, NormBall(radius), NullSpace(TEXTS))
        assert float((after.double() - before.double()).abs().max()) <= radius
        leaks.append(metrics["edit/drift/null_space_leak"])
    assert leaks[0] < 1e-5
    assert 1e-3 < leaks[1] < leaks[2] < 0.5


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("ball", [{"radius": 0.3, "norm": "l2"}, {"radius": 0.02, "norm": "linf"}])
def test_with_a_mask_the_mask_and_the_ball_are_exact_in_any_order_of_the_list(make, words, ids, ball, order):
    callbacks = [NullSpace(TEXTS), NormBall(**ball), Mask()]
    before, after, metrics = edited(make, words, ids, *(callbacks[i] for i in order))
    kept = masked(before)
    assert torch.equal(after[kept].view(torch.int32), before[kept].view(torch.int32))
    difference = (after.double() - before.double()).abs()
    assert float(difference.max() if ball["norm"] == "linf" else difference.norm()) <= ball["radius"]
    assert float(difference.norm()) > 0.1
    # With half of the entries removed, the leak is about that of a random change.
    assert 1e-2 < metrics["edit/drift/null_space_leak"] < 0.9
    assert metrics["edit/drift/ball"] <= 1.0
