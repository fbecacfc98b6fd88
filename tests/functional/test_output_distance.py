"""Distances of outputs, the quantile loss and the relative change, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kedit_train.functional.output_distance import output_distance, quantile_loss, relative_change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_distance_follows_its_formula(dtype):
    torch.manual_seed(0)
    before, now = torch.randn(3, 4, 5).to(dtype), torch.randn(3, 4, 5).to(dtype)
    a, b = before.double(), now.double()
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(output_distance(before, now, distance="mse").double(), (a - b) ** 2, **close)
    torch.testing.assert_close(output_distance(before, now, distance="quantile").double(), abs(a - b), **close)
    expected = torch.empty(3, 4, dtype=torch.float64)
    for i in range(3):
        for j in range(4):
            p, q = a[i, j].exp() / a[i, j].exp().sum(), b[i, j].exp() / b[i, j].exp().sum()
            expected[i, j] = (p * (p / q).log()).sum()
    found = output_distance(before, now, distance="kl")
    assert found.shape == (3, 4)
    torch.testing.assert_close(found.double(), expected, **close)
    assert output_distance(before[0, 0], now[0, 0], distance="kl").item() == pytest.approx(expected[0, 0].item(), 1e-4)


@pytest.mark.parametrize("distance", ["mse", "quantile", "kl"])
def test_gradients_follow_the_formula_and_are_zero_without_change(distance):
    torch.manual_seed(0)
    before = torch.randn(2, 6, dtype=torch.float64)
    now = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: output_distance(before, x, distance=distance), now)
    same = before.clone().requires_grad_()
    total = output_distance(before, same, distance=distance).sum()
    (gradient,) = torch.autograd.grad(total, same)
    assert total.item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-12)


def test_the_mean_over_evenly_spaced_quantiles_approximates_the_wasserstein_distance():
    # The 1-Wasserstein distance of two sets of equally many values is the mean difference of the sorted values.
    torch.manual_seed(0)
    first, second = torch.randn(2000), 0.5 * torch.randn(2000) + 1.0
    exact = (first.sort().values - second.sort().values).abs().mean()
    levels = (torch.arange(99) + 1) / 100
    found = output_distance(first.quantile(levels), second.quantile(levels), distance="quantile").mean()
    assert found.item() == pytest.approx(exact.item(), rel=0.02)


def test_wrong_shapes_and_names_are_errors():
    with pytest.raises(ValueError, match=r"the same shape, got \(2,\) and \(3,\)"):
        output_distance(torch.zeros(2), torch.zeros(3), distance="mse")
    with pytest.raises(ValueError, match="distance must be"):
        output_distance(torch.zeros(2), torch.zeros(2), distance="mae")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the shape \(4, 2\), got \(4, 3\)"):
        quantile_loss(torch.zeros(4, 3), torch.zeros(4), [0.1, 0.9])


def test_the_quantile_loss_follows_its_formula_and_is_smallest_at_the_quantiles():
    torch.manual_seed(0)
    levels, target = [0.1, 0.5, 0.9], torch.randn(4, 7)
    forecast = torch.randn(4, 7, 3)
    by_hand = [
        u * (y - q) if y > q else (1 - u) * (q - y)
        for row, ys in zip(forecast.tolist(), target.tolist(), strict=True)
        for qs, y in zip(row, ys, strict=True)
        for q, u in zip(qs, levels, strict=True)
    ]
    assert quantile_loss(forecast, target, levels).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    values = torch.randn(5000)
    quantiles = values.quantile(torch.tensor(levels))
    at_quantiles = quantile_loss(quantiles.expand(5000, 3), values, levels)
    for shift in (-0.1, 0.1):
        assert quantile_loss((quantiles + shift).expand(5000, 3), values, levels) > at_quantiles


def test_the_relative_change_is_a_ratio_of_norms():
    before = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert relative_change(before, [torch.tensor([3.0, 6.0]), torch.tensor([[12.0]])]) == pytest.approx(10.0 / 5.0)
    assert relative_change(before, [x.clone() for x in before]) == 0.0
    assert relative_change([torch.zeros(2)], [torch.ones(2)]) == math.inf
    assert relative_change([torch.zeros(2)], [torch.zeros(2)]) == 0.0
