"""Store the state of a gate (open or closed) in the key-value cache of the model.

The cache gets one more layer. Its tensor ``keys`` contains one bool for each row and each cached position: True if the
gate is open. Beam search and other code may reorder, copy or shorten the cache. Such code changes all layers in the
same way, so the state of the gate always fits the cached tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from kedit_train.compatibility import are_recurrent, read_cache
from kedit_train.errors import EditError


class _GateLayer(DynamicLayer):
    """A layer of the cache whose ``keys``, [rows, 1, positions, 1], are True where the gate is open."""


def open_before(inputs: Mapping[str, Any], rows: int, device: torch.device) -> Tensor:
    """Return the state of the gate at the last cached position of each row.

    The result is [rows], bool: True if the gate is open. If nothing is cached, the gate is closed in every row.

    Args:
        inputs: the arguments of the forward call, by name.
        rows: the number of rows of the batch.
        device: the device of the result.

    Raises:
        EditError: the cache is not a ``Cache`` of transformers, contains only recurrent states, has a fixed size, is
            offloaded, or contains tokens that the gated model has not read.
    """
    closed = torch.zeros(rows, dtype=torch.bool, device=device)
    given = read_cache(inputs)
    cache = _of_self_attention(given)
    if inputs.get("cache_params") is not None or _is_recurrent(cache):
        raise EditError("a gated model cannot use a cache of recurrent states; pass use_cache=False.")
    if cache is None:
        return closed
    name = next(name for name, value in inputs.items() if value is given)
    if not isinstance(cache, Cache):
        raise EditError(
            f"a gated model needs a key-value cache of the class Cache, got {type(cache).__name__} as {name}; pass "
            "use_cache=False."
        )
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
            f"{name} contains {unread} tokens that the gated model has not read; pass an empty cache, or the "
            "cache of an earlier call of this model."
        )
    return states[:, 0, -1, 0].to(device)


def add_open(cache: Any, is_open: Tensor) -> None:
    """Append the state of the gate at the new positions to a cache.

    Args:
        cache: the cache after the forward call. If it is not a ``Cache``, nothing is appended.
        is_open: the state of the gate at each new position, [rows, positions], bool. True means open.
    """
    cache = _of_self_attention(cache)
    if not isinstance(cache, Cache):
        return
    own = _gate_layer(cache)
    if own is None:
        own = _GateLayer()
        cache.layers.append(own)
    state = is_open[:, None, :, None]
    own.update(state, state)


def _of_self_attention(cache: Any) -> Any:
    # In transformers 4, GPTBigCode uses an EncoderDecoderCache, although the model has no encoder.
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _is_recurrent(cache: Any) -> bool:
    """Return True if all layers of a cache store recurrent states, as in Mamba.

    Before transformers 5.24, such a cache is passed as ``cache_params``.
    """
    layers = cache.layers if isinstance(cache, Cache) else []
    return bool(layers) and are_recurrent(layers)


def _gate_layer(cache: Cache) -> _GateLayer | None:
    return next((layer for layer in cache.layers if isinstance(layer, _GateLayer)), None)
