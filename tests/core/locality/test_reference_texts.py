"""Draws of reference texts, and the replay buffer of previous edits."""

from __future__ import annotations

import random
from collections import Counter

import torch

from kedit_train.core.locality.hidden_state_file import ReferenceStates
from kedit_train.core.locality.reference_texts import ReferenceTexts, ReplayBuffer
from kedit_train.edit import Edit

SEQUENCES = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
FIRST, SECOND, REPLACES_FIRST = Edit("a", "b"), Edit("c", "d"), Edit("a", "e")


def texts() -> ReferenceTexts:
    lengths = [len(sequence) for sequence in SEQUENCES]
    return ReferenceTexts(SEQUENCES, ReferenceStates([torch.arange(sum(lengths))], lengths))


def test_every_sequence_is_drawn_once_before_any_is_drawn_again():
    drawn = texts()
    drawn.restart(seed=0)
    order = [index for _ in range(5) for index in drawn.draw(3)]
    assert [sorted(order[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3


def test_the_seed_gives_the_order():
    orders = []
    for seed in (0, 0, 1):
        drawn = texts()
        drawn.restart(seed)
        orders.append([index for _ in range(4) for index in drawn.draw(5)])
    assert orders[0] == orders[1] != orders[2]


def test_a_draw_takes_each_sequence_at_most_once():
    drawn = texts()
    drawn.restart(seed=0)
    assert sorted(drawn.draw(50)) == [0, 1, 2, 3, 4]


def test_restricted_texts_are_not_drawn_again():
    drawn = texts()
    assert drawn.restrict([[3], [8, 9], [77]]) == 2
    drawn.restart(seed=0)
    assert Counter(index for _ in range(3) for index in drawn.draw(5)) == {1: 3, 4: 3}
    assert drawn.restrict([[1, 2]]) == 0


def test_states_are_those_of_the_sequences():
    (values,) = texts().states.take([2, 1])
    assert values.tolist() == [3, 4, 5, 2]


def fill(buffer: ReplayBuffer, *edits: Edit) -> None:
    buffer.start_run(edits)
    buffer.finish_run(edits)
    buffer.add_pending(lambda edits: [[len(edit.target)] for edit in edits], lambda sequence: torch.ones(1, 2))


def test_edits_of_a_finished_run_are_replayed_in_the_next():
    buffer = ReplayBuffer()
    fill(buffer, FIRST)
    fill(buffer, SECOND)
    buffer.start_run([Edit("x", "y")])
    assert {entry.edit.prompt for entry in buffer.draw(5, random.Random(0))} == {"a", "c"}
    assert len(buffer.draw(1, random.Random(0))) == 1


def test_an_edit_replaces_a_previous_one_with_the_same_prompt():
    buffer = ReplayBuffer()
    fill(buffer, FIRST)
    fill(buffer, SECOND)
    buffer.start_run([REPLACES_FIRST])
    assert [entry.edit for entry in buffer.active] == [SECOND]
    assert [entry.edit for entry in buffer.entries] == [FIRST, SECOND], "nothing is lost before the run has finished"
    fill(buffer, REPLACES_FIRST)
    assert [entry.edit for entry in buffer.entries] == [SECOND, REPLACES_FIRST]
