"""Which edits are trained together in each mode."""

from __future__ import annotations

import pytest

from kedit_train.errors import EditError
from kedit_train.modes import make_schedule


def trained(*args, **kwargs) -> list[tuple[int, ...]]:
    return [step.trained for step in make_schedule(*args, **kwargs)]


def test_single_and_sequential_train_one_edit_per_step():
    assert trained("single", 3) == trained("sequential", 3) == [(0,), (1,), (2,)]
    assert [step.seen for step in make_schedule("sequential", 3)] == [1, 2, 3]
    assert trained("sequential", 5, edits_per_step=2) == [(0, 1), (2, 3), (4,)]


def test_batch_trains_all_edits_at_once():
    assert trained("batch", 3) == [(0, 1, 2)]


def test_streaming_replays_all_previous_edits_by_default():
    steps = make_schedule("streaming", 250)
    assert [len(step.trained) for step in steps] == [100, 200, 250]
    assert [len(step.new) for step in steps] == [100, 100, 50]


def test_streaming_draws_a_limited_replay_with_the_seed():
    steps = make_schedule("streaming", 250, edits_per_step=50, replay=30, seed=3)
    assert [len(step.trained) for step in steps] == [50, 80, 80, 80, 80]
    for step in steps:
        previous = set(step.trained) - set(step.new)
        assert step.trained[-len(step.new) :] == step.new
        assert len(set(step.trained)) == len(step.trained)
        assert all(number < min(step.new) for number in previous)
    assert steps == make_schedule("streaming", 250, edits_per_step=50, replay=30, seed=3)
    assert steps != make_schedule("streaming", 250, edits_per_step=50, replay=30, seed=4)
    assert trained("streaming", 4, edits_per_step=2, replay=0) == [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "together"}, "mode must be one of single, batch, sequential, streaming, got 'together'"),
        ({"mode": "batch", "edits_per_step": 3}, "edits_per_step must be None for mode 'batch', got 3"),
        ({"mode": "sequential", "edits_per_step": 0}, "edits_per_step must be >= 1, got 0"),
        ({"mode": "sequential", "replay": 3}, "replay must be None for mode 'sequential', got 3"),
        ({"mode": "streaming", "replay": -1}, "replay must be >= 0"),
    ],
)
def test_arguments_that_do_not_apply_are_refused(arguments, message):
    with pytest.raises(EditError, match=message):
        make_schedule(n=4, **arguments)
