"""Scores and their bootstrap intervals."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from installed import needs

from kedit_train.evaluation import MeanOverEdits
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, Score, cluster_bootstrap, scores_of_sums


def scores_of_means(means: Sequence[MeanOverEdits], seed: int = 0) -> list[Score]:
    return scores_of_sums([(mean.total, mean.count) for mean in means], seed)


def test_the_bootstrap_equals_a_plain_loop() -> None:
    """The same draws, with a loop over all resamples."""
    rng = random.Random(3)
    edits = [[float(rng.random() < 0.7) for _ in range(rng.choice([0, 1, 2, 5]))] for _ in range(20)]
    totals = torch.tensor([[sum(own)] for own in edits], dtype=torch.float64)
    counts = torch.tensor([[len(own)] for own in edits])
    low, high = cluster_bootstrap(totals, counts, seed=5, resamples=200)[:, 0].tolist()
    draws = torch.randint(20, (200, 20), generator=torch.Generator().manual_seed(5)).tolist()
    means = []
    for drawn in draws:
        values = [value for edit in drawn for value in edits[edit]]
        means.append(sum(values) / len(values))
    means.sort()

    def percentile(p: float) -> float:
        at = p * (len(means) - 1)
        return means[int(at)] + (at - int(at)) * (means[min(int(at) + 1, len(means) - 1)] - means[int(at)])

    assert low == pytest.approx(percentile(0.025))
    assert high == pytest.approx(percentile(0.975))


def test_copies_of_a_probe_do_not_narrow_the_interval() -> None:
    """A hundred copies of each probe add no information, so the interval stays the same."""
    once, often = MeanOverEdits(30, seed=1), MeanOverEdits(30, seed=1)
    values = [float(i % 3 == 0) for i in range(30)]
    once.update(range(30), values)
    often.update([i for i in range(30) for _ in range(100)], [v for v in values for _ in range(100)])
    a, b = once.score(), often.score()
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    assert (a.n, b.n) == (30, 3000)
    assert a.low is not None
    assert a.high is not None
    # The width that normal theory gives for 30 independent edits.
    assert a.high - a.low == pytest.approx(2 * 1.96 * (1 / 3 * 2 / 3 / 30) ** 0.5, rel=0.15)


def test_the_interval_covers_the_true_value_in_95_percent_of_cases() -> None:
    rng, held = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        # Each edit has two probes that always agree. Resampling probes instead of edits would cover only 84 %.
        hits = (torch.rand(60, generator=rng) < 0.6).double()
        low, high = cluster_bootstrap(2 * hits[:, None], torch.full((60, 1), 2), seed=trial, resamples=300)[:, 0]
        held += bool(low <= 0.6 <= high)
    assert 180 <= held <= 199


def test_too_few_edits_give_no_interval_and_no_probes_give_no_score() -> None:
    none, one = MeanOverEdits(4), MeanOverEdits(4)
    none.update([], [])
    one.update([2, 2], [1.0, 0.0])
    assert none.score() == NO_SCORE
    assert one.score() == Score(0.5, n=2)
    assert scores_of_means([none, one]) == [NO_SCORE, Score(0.5, n=2)]
    assert scores_of_means([]) == []


def test_many_means_together_equal_each_one_alone() -> None:
    means = [MeanOverEdits(50, seed=4) for _ in range(3)]
    for i, mean in enumerate(means):
        mean.update(range(i, 50), [float((j * (i + 3)) % 7 < 4) for j in range(i, 50)])
    together, single = scores_of_means(means, seed=4), [mean.score() for mean in means]
    for a, b in zip(together, single, strict=True):
        assert (a.value, a.n, a.low, a.high) == pytest.approx((b.value, b.n, b.low, b.high))
    assert scores_of_means(means, seed=4) == together != scores_of_means(means, seed=9)


@needs("torchmetrics", "1.9")  # older versions have no merge_state
def test_means_of_several_processes_add_up() -> None:
    """A mean of means would be 0.5 here; a process without edits must not count."""
    whole, other, empty = (MeanOverEdits(4) for _ in range(3))
    whole.update([0, 1, 1], [1.0, 1.0, 1.0])
    other.update([3], [0.0])
    for part in (other, empty):
        whole.merge_state(part)
    assert (whole.score().value, whole.score().n) == (0.75, 4)
