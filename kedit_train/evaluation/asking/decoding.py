"""Greedy decoding of a batch with a key-value cache. Finished sequences are removed from the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kedit_train.compatibility import cache_argument
from kedit_train.core.scope.adapters import base_model
from kedit_train.data.tokenization import Encoded, collate, position_ids
from kedit_train.evaluation.asking.batching import model_device, uses_prompt_learning
from kedit_train.evaluation.asking.logits import accepts_argument

# Finished sequences are removed only when they make up at least this fraction of the batch, because every removal
# copies the cache.
_ENDED_SHARE = 0.25


@dataclass
class Continuation:
    """What the model generated after one prompt.

    Args:
        ids: the ids of the generated tokens.
        ended: True if the last token ends the text, False if the limit on new tokens was reached.
        margin: the largest logit minus the second largest, at the token where this difference is smallest. If
            ``margin`` is within the rounding error of the model's dtype, another batch size or device may give another
            answer.
        diverged: True if a logit was NaN.
    """

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    margin: float = float("inf")
    diverged: bool = False


def new_cache(model: Any) -> DynamicCache | None:
    """Return an empty key-value cache, or None if the model does not support the default cache of transformers.

    The result is None for a model with a recurrent state, a custom cache class or a learned prompt (PEFT prompt
    tuning). Without a cache, each decoding step processes the full sequence again. This is slower, but correct.
    """
    base = base_model(model)
    if uses_prompt_learning(model) or not getattr(base, "_supports_default_dynamic_cache", lambda: False)():
        return None
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return cache if plain and cache_argument(base) is not None else None


def can_pad(model: Any) -> bool:
    """Return True if one batch may contain sequences of different lengths.

    The model must accept explicit position ids, and it must use the default key-value cache. In a model with a
    recurrent state, padding tokens would change the state.
    """
    return accepts_argument(model, "position_ids") and new_cache(model) is not None


class PromptBatch:
    """A batch of sequences during decoding: their tokens, padded on the left, and the key-value cache.

    Args:
        model: a model in evaluation mode.
        sequences: one list of token ids per prompt. All lists must be equally long unless :func:`can_pad` is True.
        pad_id: the id of the padding token.
    """

    def __init__(self, model: Any, sequences: Sequence[Sequence[int]], pad_id: int) -> None:
        encoded = [Encoded(list(sequence), len(sequence)) for sequence in sequences]
        batch = collate(encoded, pad_id=pad_id, padding_side="left")
        device = model_device(model)
        self.model, self.cache = model, new_cache(model)
        self.cache_argument: str = cache_argument(base_model(model)) or ""
        self.ids, self.mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        self.unread: int = self.ids.shape[1]
        self.takes_positions: bool = accepts_argument(model, "position_ids") and not uses_prompt_learning(model)
        self.takes_logits_to_keep: bool = accepts_argument(model, "logits_to_keep") and not uses_prompt_learning(model)

    def next_logits(self) -> Tensor:
        """Return the logits of the next token, [sequences, vocabulary] in fp32."""
        unread = self.unread if self.cache is not None else self.ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": self.ids[:, -unread:], "attention_mask": self.mask}
        inputs["use_cache"] = self.cache is not None
        if self.cache is not None:
            inputs[self.cache_argument] = self.cache
        if self.takes_positions:
            inputs["position_ids"] = position_ids(self.mask)[:, -unread:]
        if self.takes_logits_to_keep:
            # On a CPU, a tensor of positions is passed instead of the number 1. With the number, the head would receive
            # a slice of the hidden states, and torch would then copy a frozen bf16 weight of the head once per
            # sequence. On GPUs, the number is passed, because with device_map the hidden states may be on another
            # device than a tensor of positions.
            on_cpu = self.ids.device.type == "cpu"
            inputs["logits_to_keep"] = torch.tensor([unread - 1]) if on_cpu else 1
        return self.model(**inputs).logits[:, -1].float()

    def logits_of_targets(self, rows: Sequence[int], targets: Sequence[Sequence[int]]) -> list[Tensor]:
        """Run the model on targets that continue the prompts, and return the logits after each target token.

        Call :meth:`next_logits` first, so that the cache contains the prompts. The model continues from
        a copy of the cache, so this call does not change the cached prompts. :func:`can_pad` must be True for the
        model.

        Args:
            rows: for each target, the index of its prompt in the batch. Several targets may have the same prompt.
            targets: one list of token ids per target. Leave out the last token of a target if you do not need the
                logits after it.

        Returns:
            One tensor per target, [tokens, vocabulary] in fp32.
        """
        index = torch.tensor(list(rows), device=self.ids.device)
        cache = copy.deepcopy(self.cache)
        assert cache is not None
        cache.batch_select_indices(index)
        padded = collate([Encoded(list(target), 0) for target in targets], pad_id=0, padding_side="right")
        mask = torch.cat([self.mask[index], padded["attention_mask"].to(self.mask.device)], dim=1)
        width = padded["input_ids"].shape[1]
        logits = self.model(
            input_ids=padded["input_ids"].to(self.ids.device),
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -width:],
            use_cache=True,
            **{self.cache_argument: cache},
        ).logits
        return [own[: len(target)].float() for own, target in zip(logits, targets, strict=True)]

    def append(self, tokens: Tensor) -> None:
        """Append one token to every sequence."""
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids.device)], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.unread = 1

    def keep(self, rows: list[int]) -> None:
        """Keep only the sequences with the row numbers in ``rows``."""
        index = torch.tensor(rows, device=self.ids.device)
        self.ids, self.mask = self.ids[index], self.mask[index]
        if self.cache is not None:
            self.cache.batch_select_indices(index)


def decode_greedily(
    model: Any,
    sequences: Sequence[Sequence[int]],
    limits: Sequence[int],
    is_end: Callable[[int], bool],
    *,
    pad_id: int,
) -> list[Continuation]:
    """Generate the most probable tokens for each sequence until an end token or the token limit is reached.

    If two tokens are equally probable, the token with the lower id is generated.

    Args:
        model: a model in evaluation mode. The caller disables gradients.
        sequences: one list of token ids per prompt. All lists must be equally long unless :func:`can_pad` is True.
        limits: the maximum number of new tokens per sequence, at least 1.
        is_end: returns True for a token that ends its sequence. The end token is part of the result.
        pad_id: the id of the padding token.
    """
    batch = PromptBatch(model, sequences, pad_id)
    return continue_greedily(batch, batch.next_logits(), limits, is_end)


def continue_greedily(
    batch: PromptBatch, logits: Tensor, limits: Sequence[int], is_end: Callable[[int], bool]
) -> list[Continuation]:
    """Continue each sequence of a batch with the most probable tokens. The model has already read the sequences.

    Args:
        batch: the batch, with one row per sequence.
        logits: the logits of the next token, [sequences, vocabulary].
        limits: the maximum number of new tokens per sequence, at least 1.
        is_end: returns True for a token that ends its sequence. The end token is part of the result.
    """
    continuations = [Continuation() for _ in limits]
    active = list(range(len(limits)))  # row of the batch -> index of its sequence
    done: set[int] = set()
    while True:
        tokens = logits.argmax(dim=-1)
        top = logits.topk(2, dim=-1).values
        for row, (token, first, margin) in enumerate(
            zip(tokens.tolist(), top[:, 0].tolist(), (top[:, 0] - top[:, 1]).tolist(), strict=True)
        ):
            index = active[row]
            continuation = continuations[index]
            if index in done:
                continue
            # topk ranks NaN above every number, so ``first`` is NaN if any logit is. Only NaN differs from itself.
            continuation.diverged = first != first
            continuation.ids.append(token)
            continuation.margin = min(continuation.margin, margin)
            continuation.ended = is_end(token)
            if continuation.ended or continuation.diverged or len(continuation.ids) >= limits[index]:
                done.add(index)
        if len(done) == len(limits):
            return continuations
        batch.append(tokens)
        remaining = [row for row, index in enumerate(active) if index not in done]
        if len(remaining) <= (1 - _ENDED_SHARE) * len(active):
            batch.keep(remaining)
            active = [active[row] for row in remaining]
        logits = batch.next_logits()
