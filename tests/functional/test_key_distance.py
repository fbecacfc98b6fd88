"""Distances to keys and the state of a gate equal their definitions, computed with loops."""

from __future__ import annotations

import math

import pytest
import torch

from kedit_train.functional.key_distance import key_distances, matches, opened_from


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distances_equal_their_definition(dtype):
    states, keys = torch.randn(7, 5).to(dtype), torch.randn(3, 5)
    found = key_distances(states, keys)
    assert found.dtype == torch.float32
    for i in range(7):
        for j in range(3):
            want = math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(states[i], keys[j], strict=True)))
            assert float(found[i, j]) == pytest.approx(want, rel=1e-5)


def test_small_distances_between_large_vectors_are_exact():
    # |a|^2 + |b|^2 - 2ab in fp32 would give 0 here.
    key = torch.full((1, 64), 1000.0)
    state = key.clone()
    state[0, 3] += 0.25
    assert float(key_distances(state, key)) == 0.25


def test_a_state_matches_if_it_is_within_the_radius_of_one_key():
    keys, radii = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([1.0, 3.0])
    states = torch.tensor([[1.0, 0.0], [1.5, 0.0], [7.0, 0.0], [6.9, 0.0], [10.0, 0.0]])
    assert matches(states, keys, radii).tolist() == [True, False, True, False, True]


def test_a_radius_of_zero_matches_nothing():
    keys = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    assert matches(keys, keys, torch.tensor([0.0, 1.0])).tolist() == [False, True]


def test_a_gate_opens_at_the_first_match_and_stays_open():
    near = torch.rand(40, 9) < 0.15
    before = torch.rand(40) < 0.2
    found = opened_from(near, before)
    for row in range(40):
        is_open = bool(before[row])
        for position in range(9):
            is_open = is_open or bool(near[row, position])
            assert bool(found[row, position]) == is_open
