"""Batches over consecutive runs: reference texts first, previous edits beside them, and the state of a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kedit_train.core.locality.hidden_state_file import ReferenceStates
from kedit_train.core.locality.reference_batches import ReferenceBatches
from kedit_train.edit import Edit
from kedit_train.errors import EditError

SEQUENCES = [[1], [2], [3], [4], [5], [6]]


def run_of(model: nn.Module, *edits: Edit) -> Any:
    """The parts of an ``EditRun`` that the batches read."""
    host = SimpleNamespace(forward_context=nullcontext)
    return SimpleNamespace(model=model, edits=edits, host=host, reference_model=nullcontext)


def batches(model: nn.Module, head: nn.Module, sequences: Any = SEQUENCES) -> ReferenceBatches:
    states = ReferenceStates([torch.zeros(len(sequences), 2)], [1] * len(sequences))
    return ReferenceBatches(sequences, states, seed=3, run=run_of(model), head=head)


def start_next_run(made: ReferenceBatches, model: nn.Module, head: nn.Module, *edits: Edit, **options: Any) -> None:
    options = {"sequences": SEQUENCES, "tokenize": lambda edits: [[9]], **options}
    made.start_next_run(run_of(model, *edits), head=head, hidden_states=lambda sequence: torch.zeros(1, 2), **options)


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 2)


@pytest.fixture
def head() -> nn.Module:
    return nn.Linear(2, 3)


def test_a_first_run_draws_texts_only(model, head):
    indices, previous = batches(model, head).draw(4)
    assert len(set(indices)) == 4
    assert previous == []


def test_previous_edits_take_half_of_a_batch_at_most(model, head):
    made = batches(model, head)
    edits = [Edit(f"prompt {i}", "target") for i in range(5)]
    made.finish_run(edits)
    start_next_run(made, model, head, Edit("new", "edit"))
    indices, previous = made.draw(4)
    assert (len(indices), len(previous)) == (2, 2)


def test_later_runs_draw_only_texts_that_are_still_allowed(model, head):
    made = batches(model, head)
    made.finish_run([])
    start_next_run(made, model, head, sequences=SEQUENCES[:2])
    assert set(made.draw(8)[0]) == {0, 1}
    made.finish_run([])
    with pytest.raises(EditError, match="uses the texts of the first run, but none of them can be used in this run"):
        start_next_run(made, model, head, sequences=SEQUENCES[4:])


def test_a_changed_head_is_an_error(model, head):
    made = batches(model, head)
    made.finish_run([])
    nn.init.zeros_(head.weight)
    with pytest.raises(EditError, match="the output head has changed since the first run"):
        start_next_run(made, model, head)


def test_a_checkpoint_continues_the_draws(model, head):
    first, second = batches(model, head), batches(model, head)
    for _ in range(3):
        first.draw(4)
    second.load_state(first.state(), 4)
    assert [first.draw(4)[0] for _ in range(4)] == [second.draw(4)[0] for _ in range(4)]


def test_a_checkpoint_of_other_texts_is_an_error(model, head):
    state = batches(model, head).state()
    with pytest.raises(EditError, match="the checkpoint was written with other reference texts"):
        batches(model, head, SEQUENCES[:3]).load_state(state, 4)


def test_a_checkpoint_of_a_later_run_is_an_error_in_a_new_process(model, head):
    made = batches(model, head)
    made.finish_run([Edit("a", "b")])
    start_next_run(made, model, head, Edit("c", "d"))
    with pytest.raises(EditError, match=r"this run cannot be resumed, because .* the checkpoint does not contain"):
        batches(model, head).load_state(made.state(), 4)
