"""The averages of Adam, against torch.optim.Adam."""

from __future__ import annotations

import pytest
import torch

from kedit_train.functional.adam import AdamAverages


def test_the_directions_are_those_of_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    optimizer, averages = torch.optim.Adam([weight], lr=1.0, eps=1e-12), AdamAverages()
    losses = []
    for step in range(5):
        gradient = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        weight.grad, before = gradient, weight.detach().clone()
        optimizer.step()
        losses.append(2.0**step)
        loss, means, directions = averages.update({"weight": gradient}, losses[-1])
        torch.testing.assert_close(directions["weight"], before - weight.detach(), rtol=1e-5, atol=1e-6)
        # The same weights average the losses and the gradients.
        weights = [0.1 * 0.9 ** (step - k) for k in range(step + 1)]
        assert loss == pytest.approx(sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights))
    assert means["weight"].shape == (5, 3)


def test_an_entry_without_gradients_does_not_move() -> None:
    averages = AdamAverages()
    _, _, directions = averages.update({"weight": torch.tensor([0.0, 1.0, 1e-12])}, 1.0)
    assert directions["weight"][0] == 0.0
    assert directions["weight"][1] == pytest.approx(1.0, abs=1e-5)
    # A rounding error next to a gradient of 1.
    assert abs(float(directions["weight"][2])) < 1e-5
    _, _, nothing = AdamAverages().update({"weight": torch.zeros(2)}, 1.0)
    assert torch.equal(nothing["weight"], torch.zeros(2))


def test_columns_share_their_average_square() -> None:
    generator = torch.Generator().manual_seed(0)
    averages, squares = AdamAverages(momentum=0.0, by_column=True), torch.zeros(3, dtype=torch.float64)
    for step in range(1, 4):
        gradient = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        squares = 0.999 * squares + 0.001 * gradient.square().mean(0)
        loss, means, directions = averages.update({"weight": gradient}, float(step))
        torch.testing.assert_close(
            directions["weight"], gradient / (squares / (1 - 0.999**step)).sqrt(), rtol=1e-5, atol=0
        )
        # Without momentum, loss and gradient are those of this step.
        assert loss == pytest.approx(step)
        torch.testing.assert_close(means["weight"], gradient)


def test_with_a_floor_small_gradients_move_their_entries_less() -> None:
    averages = AdamAverages(momentum=0.0, by_column=True, floor=0.5)
    _, _, directions = averages.update({"weight": torch.tensor([[3.0, 0.0], [4.0, 0.1]])}, 1.0)
    roots = torch.tensor([12.5, 0.005]).sqrt()
    expected = torch.tensor([[3.0, 0.0], [4.0, 0.1]]) / (roots + 0.5 * roots.mean())
    torch.testing.assert_close(directions["weight"], expected)
