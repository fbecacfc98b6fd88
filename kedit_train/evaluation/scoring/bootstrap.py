"""Scores with the number of probes and a bootstrap confidence interval over edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """A mean over probes, with a 95 % confidence interval.

    Args:
        value: the mean. None if no probe was measured.
        n: the number of probes.
        low: lower bound of the interval. None if fewer than two edits have a value.
        high: upper bound of the interval. None if ``low`` is None.

    Example:
        >>> from kedit_train.evaluation import Score
        >>> Score(0.8, n=50, low=0.68, high=0.9).value
        0.8
        >>> Score(None, n=0)  # no probes: no score, neither 0 nor 1
        Score(value=None, n=0, low=None, high=None)
    """

    value: float | None
    _: KW_ONLY
    n: int
    low: float | None = None
    high: float | None = None


NO_SCORE = Score(None, n=0)


def cluster_bootstrap(totals: Tensor, counts: Tensor, *, seed: int = 0, resamples: int = RESAMPLES) -> Tensor:
    """Compute bootstrap percentile intervals of ``sum(totals) / sum(counts)`` for M metrics, by resampling edits.

    Each edit is drawn together with all its probes, because the probes of one edit tend to succeed or fail together.
    Resampling single probes would make every interval too narrow.

    If all edits have the same score (all 0 or all 1), the interval has zero width, but the true score is still
    uncertain. For example, if all n edits succeed, the true fraction of failing edits can be up to about 3 / n (upper
    95 % confidence bound).

    Args:
        totals: [edits, M], the sum of each edit's values.
        counts: [edits, M], the number of each edit's values.
        seed: seed of the resamples. Equal seeds give equal intervals on every machine with the same torch version.
        resamples: number of resamples.

    Returns:
        [2, M] in fp64: the lower and upper bounds. A bound is NaN if fewer than two edits have a value.

    References:
        Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
    """
    totals, counts = totals.double().cpu(), counts.double().cpu()
    edits = len(totals)
    generator = torch.Generator().manual_seed(seed)
    means = []
    # The draws of one chunk take at most 64 MiB.
    chunk = max(1, 2**23 // max(1, edits))
    for start in range(0, resamples if edits else 0, chunk):
        draws = torch.randint(edits, (min(chunk, resamples - start), edits), generator=generator)
        times_drawn = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(
            1, draws, torch.ones(()).double().expand_as(draws)
        )
        means.append((times_drawn @ totals) / (times_drawn @ counts))
    if not means:
        return torch.full((2, totals.shape[1]), torch.nan, dtype=torch.float64)
    quantiles = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    bounds = torch.cat(means).nanquantile(quantiles, dim=0)
    return bounds.masked_fill((counts > 0).sum(0) < 2, torch.nan)


def sums_per_edit(edits: Sequence[int], values: Sequence[float | bool], *, n_edits: int) -> tuple[Tensor, Tensor]:
    """Return the sum of each edit's values in fp64, and the number of each edit's values.

    Args:
        edits: ``values[i]`` belongs to the edit with the number ``edits[i]``, from 0 to ``n_edits - 1``.
        values: the values. The list may be empty.
        n_edits: number of edits.

    Returns:
        The sums and the numbers, two tensors of shape [n_edits].
    """
    index = torch.tensor(list(edits), dtype=torch.int64)
    added = torch.tensor([float(value) for value in values], dtype=torch.float64)
    total = torch.zeros(n_edits, dtype=torch.float64).index_add_(0, index, added)
    return total, torch.zeros(n_edits, dtype=torch.int64).index_add_(0, index, torch.ones_like(index))


def mean_score(values: Sequence[float | bool], seed: int = 0) -> Score:
    """Return the mean of the values, with a bootstrap interval over the values.

    Only the given values are used. Values of other processes are not gathered.
    """
    return scores_of_sums([sums_per_edit(range(len(values)), values, n_edits=len(values))], seed)[0]


def ratio_scores(totals: Tensor, counts: Tensor, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Score]:
    """Return the scores ``sum(totals) / sum(counts)`` of M metrics. All metrics use the same resamples.

    Args:
        totals: [edits, M], the sum of each edit's values.
        counts: [edits, M], the number of each edit's values.
        seed: seed of the bootstrap.
        resamples: number of resamples.
    """
    lows, highs = cluster_bootstrap(totals, counts, seed=seed, resamples=resamples).tolist()
    values, n = (totals.sum(0) / counts.sum(0)).tolist(), counts.sum(0).tolist()
    return [
        Score(none_if_nan(value), n=int(count), low=none_if_nan(low), high=none_if_nan(high))
        for value, count, low, high in zip(values, n, lows, highs, strict=True)
    ]


def scores_of_sums(sums: Sequence[tuple[Tensor, Tensor]], seed: int = 0) -> list[Score]:
    """Return one score per result of :func:`sums_per_edit`. All results must be for the same edits."""
    if not sums:
        return []
    totals, counts = (torch.stack(tensors, 1) for tensors in zip(*sums, strict=True))
    return ratio_scores(totals, counts, seed=seed)


def none_if_nan(number: float) -> float | None:
    """Return None for NaN, and any other number unchanged."""
    return None if number != number else number
