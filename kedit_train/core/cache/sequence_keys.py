"""By what a row of a batch is known: its token ids, the position that it starts at, and how the model would run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from kedit_train.functional.labels import IGNORE_INDEX

# Arguments of a backbone that say nothing about its hidden states, beside those read here.
_ASIDE = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "num_items_in_batch"}
# Requests that configurations can make for every call.
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass(frozen=True)
class Rows:
    """The rows of one batch of ``shape`` [B, S]: their keys, and where each lies in its row of the batch."""

    keys: list[str]
    spans: list[slice]
    shape: torch.Size


def read_rows(given: Mapping[str, Any], labels: Tensor | None, masked: bool, config: Any, mode: bytes) -> Rows | str:
    """Read what a backbone was called with.

    Args:
        given: its arguments by name, ``input_ids`` [B, S] among them, without those that are None.
        labels: [B, S] as the language model was given them; None where they are unknown.
        masked: although there are no labels, nothing is read at padding.
        config: the backbone's configuration.
        mode: what else hidden states depend on.

    Returns:
        The rows; or why rows of this call cannot be known by their content.
    """
    ids, mask, positions = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        return f"attention_mask is not of the shape {tuple(ids.shape)} of input_ids"
    if positions is not None and not (positions.ndim == 2 and positions.shape[-1] == ids.shape[-1]):
        return f"position_ids are not of the shape {tuple(ids.shape)} of input_ids"
    ids = ids.detach().cpu().long()
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.detach().cpu().bool()
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        return "attention_mask has a gap within a row"
    columns = real.int().argmax(1)
    if labels is None or labels.shape != ids.shape:
        if not masked and not bool(real.all()):
            return "it is padded and comes without labels, so whether its loss leaves padding out is unknown"
    elif bool((~real[:, :-1] & (labels.detach().cpu()[:, 1:] != IGNORE_INDEX)).any()):
        # The first token of a row that is padded on the left is often supervised, by the state of the padding.
        return "a token next to padding is predicted from it, as far as the labels tell (mask its label)"
    starts = columns
    if positions is not None:
        positions = positions.detach().cpu().expand(ids.shape)
        if bool(((positions.diff(dim=1) != 1) & real[:, 1:] & real[:, :-1]).any()):
            return "position_ids start again within a row (packing), so a row is no example"
        starts = positions.gather(1, columns.unsqueeze(1)).squeeze(1)
    lengths = real.sum(1)
    if (longest := _longest(config)) is not None and bool((starts + lengths > longest).any()):
        return f"rotary embeddings of this model change beyond {longest} positions"
    asks = [name for name in _OUTPUTS if given.get(name, getattr(config, name, False))]
    if given.get("use_cache"):
        asks.append("use_cache=True")
    # Unknown ones may change the hidden states: not guessed.
    asks += [k for k, v in given.items() if k not in _ASIDE and k not in _OUTPUTS and v is not False]
    if asks:
        return f"{asks[0]} was given, which needs every layer or may change what they compute"
    # Positions that the model counts by itself may leave padding out, or not.
    mode += b"counted" if positions is None else b"given"
    bounds = zip(columns.tolist(), lengths.tolist(), strict=True)
    spans = [slice(column, column + length) for column, length in bounds]
    keys = [_key(mode, start, row[span]) for start, row, span in zip(starts.tolist(), ids, spans, strict=True)]
    return Rows(keys, spans, ids.shape)


def _key(mode: bytes, start: int, ids: Tensor) -> str:
    digest = blake2b(mode, digest_size=16)
    digest.update(start.to_bytes(8, "little", signed=True))
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def _longest(config: Any) -> int | None:
    """Positions up to which rotary embeddings do not depend on the length of the batch; None where they never do."""
    scaling = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
    if "dynamic" not in scaling and "longrope" not in scaling:
        return None
    return getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
