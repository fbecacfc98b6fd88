from __future__ import annotations

import random

import pytest
import torch

from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, MeanOverEdits, Score, cluster_bootstrap, scores_of_means


def test_against_drawing_edits_one_by_one() -> None:
    """The same draws, every resample by a loop."""
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


def test_probes_of_one_edit_count_as_one() -> None:
    """A hundred copies of each probe tell nothing new: the interval stays what it was."""
    once, often = MeanOverEdits(30, seed=1), MeanOverEdits(30, seed=1)
    values = [float(i % 3 == 0) for i in range(30)]
    once.update(range(30), values)
    often.update([i for i in range(30) for _ in range(100)], [v for v in values for _ in range(100)])
    a, b = once.score(), often.score()
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    assert (a.n, b.n) == (30, 3000)
    assert a.low is not None
    assert a.high is not None
    # Normal theory for 30 independent edits, as a check on the size.
    assert a.high - a.low == pytest.approx(2 * 1.96 * (1 / 3 * 2 / 3 / 30) ** 0.5, rel=0.15)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, held = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        # Two probes an edit that always agree: drawing probes instead of edits would cover some 84 %.
        hits = (torch.rand(60, generator=rng) < 0.6).double()
        low, high = cluster_bootstrap(2 * hits[:, None], torch.full((60, 1), 2), seed=trial, resamples=300)[:, 0]
        held += bool(low <= 0.6 <= high)
    assert 180 <= held <= 199


def test_nothing_to_say_is_said() -> None:
    none, one = MeanOverEdits(4), MeanOverEdits(4)
    none.update([], [])
    one.update([2, 2], [1.0, 0.0])
    assert none.score() == NO_SCORE
    assert one.score() == Score(0.5, n=2)
    assert scores_of_means([none, one]) == [NO_SCORE, Score(0.5, n=2)]
    assert scores_of_means([]) == []


def test_together_is_the_same_as_one_by_one_and_seeded() -> None:
    means = [MeanOverEdits(50, seed=4) for _ in range(3)]
    for i, mean in enumerate(means):
        mean.update(range(i, 50), [float((j * (i + 3)) % 7 < 4) for j in range(i, 50)])
    together, single = scores_of_means(means, seed=4), [mean.score() for mean in means]
    for a, b in zip(together, single, strict=True):
        assert (a.value, a.n, a.low, a.high) == pytest.approx((b.value, b.n, b.low, b.high))
    assert scores_of_means(means, seed=4) == together != scores_of_means(means, seed=9)


def test_parts_add_up() -> None:
    """Means of means would give 0.5 here; an empty process must not count."""
    whole, other, empty = (MeanOverEdits(4) for _ in range(3))
    whole.update([0, 1, 1], [1.0, 1.0, 1.0])
    other.update([3], [0.0])
    for part in (other, empty):
        whole.merge_state(part)
    assert (whole.score().value, whole.score().n) == (0.75, 4)
