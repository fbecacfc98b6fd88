"""Store in the key-value cache of a gated model where the gate is open.

The state of the gate is one more layer of the cache. The tensor ``keys`` of this layer contains one bool for each row
and each cached position: whether the gate is open. Beam search, and code that selects rows, copies the cache or removes
the last tokens, change this layer like every other layer, so the state always fits the cached tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kedit_train.errors import EditError


class _GateLayer(DynamicLayer):
    """A layer of the cache with ``keys`` [rows, 1, positions, 1], bool: whether the gate is open."""


def open_before(cache: Any, rows: int, device: torch.device) -> Tensor:
    """Return for each row whether the gate is open at the last cached position, [rows], bool.

    If nothing is cached, the gate is closed in every row.

    Args:
        cache: the ``past_key_values`` of a forward call, or None.
        rows: the number of rows of the batch.
        device: the device of the result.

    Raises:
        EditError: the cache is not a ``Cache`` of transformers, has a fixed size, is offloaded, or contains tokens that
            the gated model has not read.
    """
    closed = torch.zeros(rows, dtype=torch.bool, device=device)
    if cache is None:
        return closed
    if not isinstance(cache, Cache):
        raise EditError(f"past_key_values must be a Cache of transformers, got {type(cache).__name__}.")
    if cache.is_compileable:
        raise EditError(
            f"a gated model needs a key-value cache that grows, got {type(cache).__name__}; leave out "
            "cache_implementation=."
        )
    if getattr(cache, "offloading", False):
        # The cache loads its next layer ahead of time, and would load the layer of the gate instead of the first layer.
        raise EditError("a gated model cannot use an offloaded key-value cache; leave out cache_implementation=.")
    length = int(cache.get_seq_length())
    if length == 0:
        return closed
    own = _gate_layer(cache)
    states = None if own is None or own.keys is None or own.keys.shape[0] != rows else own.keys
    read = 0 if states is None else int(states.shape[2])
    if states is None or read != length:
        unread = length - read if read < length else length
        raise EditError(
            f"past_key_values contains {unread} tokens that the gated model has not read; pass an empty cache, or the "
            "cache of an earlier call of this model."
        )
    return states[:, 0, -1, 0].to(device)


def add_open(cache: Any, is_open: Tensor) -> None:
    """Append to a cache whether the gate is open at the new positions.

    Args:
        cache: the cache after the forward call. If it is not a ``Cache``, nothing is appended.
        is_open: whether the gate is open at each new position, [rows, positions], bool.
    """
    if not isinstance(cache, Cache):
        return
    own = _gate_layer(cache)
    if own is None:
        own = _GateLayer()
        cache.layers.append(own)
    state = is_open[:, None, :, None]
    own.update(state, state)


def _gate_layer(cache: Cache) -> _GateLayer | None:
    return next((layer for layer in cache.layers if isinstance(layer, _GateLayer)), None)
