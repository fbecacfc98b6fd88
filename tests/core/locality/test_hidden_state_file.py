"""Reference tensors in memory and in a file: the same values, within a memory limit, and never those of another key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kedit_train.core.locality.hidden_state_file import Batch, collect_states, read_states, write_states
from kedit_train.errors import EditError

LENGTHS = [2, 1, 3]
VALUES = torch.arange(12, dtype=torch.float32).view(6, 2)


def batches() -> Iterator[Batch]:
    yield [1, 0], [torch.cat([VALUES[2:3], VALUES[:2]])]
    yield [2], [VALUES[3:]]


def test_states_are_returned_by_sequence_whatever_the_batches():
    states = collect_states(batches(), LENGTHS)
    (values,) = states.take([2, 0])
    assert torch.equal(values, torch.cat([VALUES[3:], VALUES[:2]]))
    assert states.nbytes == 6 * 2 * 4


@pytest.mark.parametrize("limit", [None, 47])
def test_a_file_has_the_same_values_in_memory_and_mapped(tmp_path: Path, limit):
    write_states(batches(), LENGTHS, tmp_path / "a.safetensors", "key")
    states = read_states(tmp_path / "a.safetensors", "key", LENGTHS, limit)
    assert states is not None
    assert states.memory_mapped == (limit is not None)
    assert torch.equal(states.take([0, 1, 2])[0], VALUES)


def test_more_than_the_memory_limit_is_an_error():
    with pytest.raises(EditError, match="reference hidden states take 48 bytes, but memory_limit is 47 bytes; set"):
        collect_states(batches(), LENGTHS, 47)


def test_a_missing_file_is_not_read(tmp_path: Path):
    assert read_states(tmp_path / "a.safetensors", "key", LENGTHS) is None


@pytest.mark.parametrize(("key", "lengths"), [("other", LENGTHS), ("key", [2, 1])])
def test_a_file_of_something_else_is_not_used(tmp_path: Path, key, lengths):
    write_states(batches(), LENGTHS, tmp_path / "a.safetensors", "key")
    with pytest.warns(UserWarning, match="The reference hidden states are computed again"):
        assert read_states(tmp_path / "a.safetensors", key, lengths) is None
