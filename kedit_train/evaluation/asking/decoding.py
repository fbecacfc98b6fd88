"""Greedy decoding of many rows: keys and values kept, rows that have ended taken out of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kedit_train.data.tokenization import Encoded, collate, position_ids
from kedit_train.evaluation.asking.batching import base_of, device_of, learns_prompts
from kedit_train.evaluation.asking.logits import takes

# Rows are taken out once this share of the batch has ended: copying the cache for each one would cost more.
_ENDED = 0.25


@dataclass
class Decoded:
    """What a row was continued with.

    Args:
        ids: the new tokens.
        ended: whether the last of them ends the text; otherwise the row's bound cut it.
        margin: the smallest distance, in logits, between a first choice and the second on the way. Where it is within
            the rounding of the model's dtype, another batch size or device may have answered otherwise.
        diverged: a logit was NaN.
    """

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    margin: float = float("inf")
    diverged: bool = False


def new_cache(model: Any) -> DynamicCache | None:
    """An empty cache of keys and values; None where the model keeps something else (a recurrent state, its own class,
    learned prompts), so that every step reads the whole row again: slower, and right for all of them."""
    base = base_of(model)
    if learns_prompts(model) or not getattr(base, "_supports_default_dynamic_cache", lambda: False)():
        return None
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return cache if plain and takes(model, "past_key_values") else None


def may_pad(model: Any) -> bool:
    """Whether rows of different lengths may share a batch: positions can be given, and no state runs over padding."""
    return takes(model, "position_ids") and new_cache(model) is not None


class _Rows:
    """A batch on its way: its tokens so far, padded on the left, and the cache behind them."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> None:
        batch = collate([Encoded(list(row), len(row)) for row in rows], pad_id=pad_id, padding_side="left")
        device = device_of(model)
        self.model, self.cache = model, new_cache(model)
        self.ids, self.mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        self.unread = self.ids.shape[1]
        self.positions = takes(model, "position_ids") and not learns_prompts(model)
        self.last_only = takes(model, "logits_to_keep") and not learns_prompts(model)

    def logits(self) -> Tensor:
        """What comes next, [rows, V] in fp32."""
        unread = self.unread if self.cache is not None else self.ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": self.ids[:, -unread:], "attention_mask": self.mask}
        inputs["use_cache"] = self.cache is not None
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        if self.positions:
            inputs["position_ids"] = position_ids(self.mask)[:, -unread:]
        if self.last_only:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs).logits[:, -1].float()

    def append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids.device)], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.unread = 1

    def keep(self, at: list[int]) -> None:
        chosen = torch.tensor(at, device=self.ids.device)
        self.ids, self.mask = self.ids[chosen], self.mask[chosen]
        if self.cache is not None:
            self.cache.batch_select_indices(chosen)


def decode(
    model: Any,
    rows: Sequence[Sequence[int]],
    most: Sequence[int],
    stops: Callable[[int], bool],
    *,
    pad_id: int,
) -> list[Decoded]:
    """Continue each row greedily (the lowest id wins a tie) to a token at which it ``stops``, or for ``most`` tokens.

    Args:
        model: in evaluation mode, without gradients.
        rows: token ids; of equal length unless :func:`may_pad`.
        most: for each row at least 1.
        stops: whether a token, itself part of what is returned, ends its row.
    """
    batch, found = _Rows(model, rows, pad_id), [Decoded() for _ in rows]
    live = list(range(len(rows)))  # which row each line of the batch is
    done: set[int] = set()
    while True:
        logits = batch.logits()
        tokens = logits.argmax(dim=-1)
        top = logits.topk(2, dim=-1).values
        for line, (token, first, margin) in enumerate(
            zip(tokens.tolist(), top[:, 0].tolist(), (top[:, 0] - top[:, 1]).tolist(), strict=True)
        ):
            row = live[line]
            own = found[row]
            if row in done:
                continue
            # topk ranks NaN above every number.
            own.diverged = first != first
            own.ids.append(token)
            own.margin = min(own.margin, margin)
            own.ended = stops(token)
            if own.ended or own.diverged or len(own.ids) >= most[row]:
                done.add(row)
        if len(done) == len(rows):
            return found
        batch.append(tokens)
        left = [line for line, row in enumerate(live) if row not in done]
        if len(left) <= (1 - _ENDED) * len(live):
            batch.keep(left)
            live = [live[line] for line in left]
