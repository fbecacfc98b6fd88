"""Null space, then ball, then mask: what still holds exactly behind each, and how much of what does not is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_train.callbacks import EditCallback, NormBall, NullSpace, ParameterScope, editing

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 w21 w22 w23"]
NAME = "model.layers.1.mlp.down_proj.weight"


class Mask(EditCallback):
    """Every second entry keeps its reference, as GradientMask has it."""

    order = 48
    constrains = True

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.where(held(w), reference[n], w) for n, w in weights.items()}


def held(weight: Tensor) -> Tensor:
    return (torch.arange(weight.numel()) % 2 == 0).reshape(weight.shape)


def edited(make: Any, words: Any, ids: Tensor, *callbacks: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(weight before, weight after, last metrics)."""
    torch.manual_seed(0)
    model = make("llama")
    before = model.get_parameter(NAME).detach().clone()
    scope = ParameterScope(1, "mlp.down_proj.weight")
    with editing(model, [*callbacks, scope], tokenizer=words, log_every_n_steps=1) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(50):
            edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return before, model.get_parameter(NAME).detach(), edit.history[-1]


def space() -> NullSpace:
    return NullSpace(TEXTS, keep_energy=0.9)


def norm(before: Tensor, after: Tensor) -> float:
    return float((after.double() - before.double()).norm())


def test_an_l2_ball_keeps_the_null_space(make, words, ids):
    free = norm(*edited(make, words, ids, space())[:2])
    for radius in (0.5 * free, 0.1 * free):
        before, after, row = edited(make, words, ids, NormBall(radius, norm="l2"), space())
        assert 0.99 * radius < norm(before, after) <= radius
        # The rounding of stored weights weighs the more the smaller the change.
        assert row["edit/drift/null_space_leak"] < 1e-5


def test_clipping_does_not_and_the_metric_says_how_much_is_left(make, words, ids):
    before, after, _ = edited(make, words, ids, space())
    greatest = float((after - before).abs().max())
    leaks = []
    for radius in (2.0 * greatest, 0.5 * greatest, 0.02 * greatest):
        before, after, row = edited(make, words, ids, NormBall(radius), space())
        assert float((after.double() - before.double()).abs().max()) <= radius
        leaks.append(row["edit/drift/null_space_leak"])
    assert leaks[0] < 1e-5
    assert 1e-3 < leaks[1] < leaks[2] < 0.5


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_with_a_mask_last_mask_and_ball_are_exact_and_the_null_space_is_not(make, words, ids, order):
    for ball in ({"radius": 0.3, "norm": "l2"}, {"radius": 0.02, "norm": "linf"}):
        callbacks = [space(), NormBall(**ball), Mask()]
        before, after, row = edited(make, words, ids, *(callbacks[i] for i in order))
        kept = held(before)
        assert torch.equal(after[kept].view(torch.int32), before[kept].view(torch.int32))
        difference = (after.double() - before.double()).abs()
        assert float(difference.max() if ball["norm"] == "linf" else difference.norm()) <= ball["radius"]
        assert float(difference.norm()) > 0.1
        # Half of the entries gone, about what a random change has in the preserved directions.
        assert 1e-2 < row["edit/drift/null_space_leak"] < 0.9
        assert row["edit/drift/ball"] <= 1.0
