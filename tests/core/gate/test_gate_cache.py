"""The state of the gate is stored in the key-value cache."""

from __future__ import annotations

import pytest
import torch
from installed import CACHE
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from kedit_train.core.gate.gate_cache import add_open, open_before
from kedit_train.errors import EditError

OPEN = torch.tensor([[False, True, False], [False, False, True]])


def filled(positions: int) -> DynamicCache:
    """Return a cache of one layer."""
    cache, states = DynamicCache(), torch.zeros(2, 1, positions, 4)
    cache.update(states, states, 0)
    return cache


@pytest.mark.parametrize("pair", [False, True])
def test_the_last_state_of_each_row_is_read_from_a_cache_or_a_pair_of_caches(pair: bool) -> None:
    own = filled(3)
    cache: Cache = EncoderDecoderCache(own, DynamicCache()) if pair else own
    add_open(cache, OPEN)
    found = open_before({CACHE: cache}, 2, torch.device("cpu"))
    assert found.tolist() == [False, True]


def test_a_cache_of_another_class_is_an_error_with_a_remedy() -> None:
    with pytest.raises(EditError, match=rf"got tuple as {CACHE}; pass use_cache=False\.$"):
        open_before({CACHE: ((torch.zeros(1), torch.zeros(1)),)}, 2, torch.device("cpu"))
