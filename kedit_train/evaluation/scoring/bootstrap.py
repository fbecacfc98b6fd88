"""A score with what is known about its precision: how many probes, and a bootstrap interval over edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """A mean over ``n`` probes; ``value`` is ``None`` where ``n`` is 0: there was nothing to ask.

    ``low`` and ``high`` bound it with 95 % confidence; ``None`` where fewer than two edits stand behind it.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None


def cluster_bootstrap(totals: Tensor, counts: Tensor, *, seed: int = 0, resamples: int = RESAMPLES) -> Tensor:
    """Percentile intervals of M ratios ``sum(totals) / sum(counts)``, resampling whole edits.

    The probes of one edit succeed and fail together, so drawing them one by one would make every interval too narrow;
    an edit is drawn with all its probes (the cluster bootstrap; Efron & Tibshirani, "An Introduction to the
    Bootstrap", 1993, ch. 8 and 13). Where all edits agree (a score of 0 or 1) nothing varies and the interval has no
    width, which is no proof of certainty: with n edits, up to 3 / n is then still possible.

    Args:
        totals: [edits, M], the sum of each edit's values; counts: [edits, M], how many they are.
        seed: of the resamples; equal seeds give equal intervals on every machine with the same torch.

    Returns:
        [2, M] in fp64: low and high; NaN where fewer than two edits have a value.
    """
    totals, counts = totals.double().cpu(), counts.double().cpu()
    edits = len(totals)
    generator = torch.Generator().manual_seed(seed)
    means = []
    # At most 64 MiB of draws at a time.
    chunk = max(1, 2**23 // max(1, edits))
    for begin in range(0, resamples if edits else 0, chunk):
        draws = torch.randint(edits, (min(chunk, resamples - begin), edits), generator=generator)
        times = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(
            1, draws, torch.ones(()).double().expand_as(draws)
        )
        means.append((times @ totals) / (times @ counts))
    if not means:
        return torch.full((2, totals.shape[1]), torch.nan, dtype=torch.float64)
    at = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    bounds = torch.cat(means).nanquantile(at, dim=0)
    return bounds.masked_fill((counts > 0).sum(0) < 2, torch.nan)


class EditMean(Metric):
    """Mean of values that belong to edits, with its bootstrap interval over edits.

    The states are sums per edit, so several processes, each with some of the edits, add up exactly; synchronise as with
    any ``torchmetrics.Metric`` (``compute``, or ``self.log`` of a LightningModule).

    Args:
        n_edits: edits in all, on all processes; values name theirs by its number.
        seed, resamples: of the bootstrap.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, n_edits: int, *, seed: int = 0, resamples: int = RESAMPLES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed, self.resamples = seed, resamples
        self.add_state("total", default=torch.zeros(n_edits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros(n_edits, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, edits: Sequence[int], values: Sequence[float | bool]) -> None:
        """Add one value per entry of ``edits``; none at all is fine (a process without probes still takes part)."""
        given = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.total.device)
        at = torch.tensor(list(edits), dtype=torch.int64, device=self.total.device)
        self.total.index_add_(0, at, given)
        self.count.index_add_(0, at, torch.ones_like(at))

    def compute(self) -> Tensor:
        """``[value, n, low, high]`` in fp64; NaN for what there is not."""
        bounds = cluster_bootstrap(self.total[:, None], self.count[:, None], seed=self.seed, resamples=self.resamples)
        n = self.count.sum()
        return torch.stack([(self.total.sum() / n).cpu(), n.double().cpu(), *bounds[:, 0]])

    def score(self) -> Score:
        """What :meth:`compute` gives, as a :class:`Score`."""
        value, n, low, high = self.compute().tolist()
        return Score(_known(value), int(n), _known(low), _known(high))


def ratio_scores(totals: Tensor, counts: Tensor, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Score]:
    """The scores ``sum(totals) / sum(counts)`` of M metrics, [edits, M] each, from one set of resamples."""
    low, high = cluster_bootstrap(totals, counts, seed=seed, resamples=resamples).tolist()
    value, n = (totals.sum(0) / counts.sum(0)).tolist(), counts.sum(0).tolist()
    return [Score(_known(v), int(k), _known(a), _known(b)) for v, k, a, b in zip(value, n, low, high, strict=True)]


def scores_of(means: Iterable[EditMean], seed: int = 0) -> list[Score]:
    """The scores of many metrics over the same edits, as this process holds them."""
    means = list(means)
    if not means:
        return []
    totals, counts = torch.stack([m.total for m in means], 1), torch.stack([m.count for m in means], 1)
    return ratio_scores(totals, counts, seed=seed, resamples=means[0].resamples)


def _known(number: float) -> float | None:
    return None if number != number else number
