"""Masks equal sorting by hand, with exact counts and whole neurons."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit_train.functional.gradient_masks import fisher_ratio, keep_top, unit_mask, unit_scores


def by_hand(scores: Tensor, density: float) -> Tensor:
    values = scores.flatten().tolist()
    chosen = sorted(range(len(values)), key=lambda i: (-values[i], i))[: round(density * len(values))]
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[chosen] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.29, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3), (4, 3, 2), (1000,)])
@pytest.mark.parametrize("levels", [None, 3], ids=["all different", "many equal"])
def test_exactly_the_highest_scores_are_kept(density, shape, levels):
    for seed in range(5):
        torch.manual_seed(seed)
        scores = torch.rand(shape) if levels is None else torch.randint(levels, shape).float()
        if levels and round(density * scores.numel()) not in (0, scores.numel()) and scores.unique().numel() == 1:
            continue
        mask = keep_top(scores, density)
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == round(density * scores.numel())
        assert torch.equal(mask, by_hand(scores, density))


def test_of_equal_scores_the_first_are_kept():
    assert keep_top(torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0]), 0.6).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize(
    ("scores", "density", "message"),
    [
        ([0.0, 0.0, 0.0], 0.34, "scores must differ to rank the weights, but all scores are 0"),
        ([0.0, float("nan"), 1.0], 0.34, "scores must be finite, but 1 of 3 scores are not finite"),
        ([float("inf"), float("inf"), 1.0], 0.34, "scores must be finite, but 2 of 3 scores are not finite"),
        ([1.0, 2.0], 1.5, r"density must be in \[0, 1\], got 1.5"),
        ([1.0, 2.0], float("nan"), r"density must be in \[0, 1\], got nan"),
    ],
)
def test_scores_without_a_ranking_are_refused(scores, density, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        keep_top(torch.tensor(scores), density)


@pytest.mark.parametrize("dim", [0, 1])
def test_neuron_scores_and_masks(dim):
    scores = torch.rand(3, 4, 2)
    units = unit_scores(scores, dim)
    for i in range(scores.shape[dim]):
        assert units[i].item() == pytest.approx(scores.select(dim, i).mean().item(), rel=1e-6)
    chosen = units > units.median()
    mask = unit_mask(chosen, scores.shape, dim)
    assert mask.shape == scores.shape
    for i in range(scores.shape[dim]):
        assert mask.select(dim, i).unique().tolist() == [chosen[i].item()]


def test_the_ratio_does_not_depend_on_scale():
    edit, general = torch.rand(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    general[0, 0] = 0.0
    got = fisher_ratio(edit, general)
    mean = sum(general.flatten().tolist()) / 30
    assert got[0, 0].item() == pytest.approx(edit[0, 0].item() / (0.1 * mean))
    assert got[2, 3].item() == pytest.approx(edit[2, 3].item() / (general[2, 3].item() + 0.1 * mean))
    assert torch.allclose(fisher_ratio(7 * edit, 1e-9 * general), 7e9 * got)
