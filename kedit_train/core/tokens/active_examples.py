"""Rows of a training batch that have nothing left to learn: known by content, left out, and looked at again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedit_train.core.cache.sequence_keys import real_tokens, supervised_keys
from kedit_train.functional.labels import IGNORE_INDEX


class ActiveRows:
    """Remembers, for each row, whether a supervised token of it was still active when it was last looked at.

    Args:
        recheck: a row without any is left out this many times, then looked at once more.
        probability: what every label of a learned row has to reach; None goes by the objective's own clip.

    Attributes:
        resting: row -> how many more times it is left out, and what its tokens had when they were last looked at: the
            sums of their loss and of whatever else the host logs.
        seconds_saved: an estimate, by what a real token of the other rows took from one call to the next.
    """

    def __init__(self, recheck: int, probability: float | None) -> None:
        self.recheck, self.probability = recheck, probability
        self.rows = self.rows_left_out = self.tokens = self.tokens_left_out = 0
        self.resting: dict[str, list[float]] = {}
        self.seconds_saved = 0.0
        self._began, self._worked = 0.0, 0
        self._keys: list[str] = []

    def select(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Left]:
        """Take the rows that have nothing left to learn out of a forward call, and columns that only pad the rest.

        Args:
            kwargs: of the call, ``input_ids`` and ``labels`` [B, S] among them. Whatever else is a tensor has to have
                a row for each of theirs, or nothing is left out.

        Returns:
            The arguments, and what was left out of them. At least one row stays, with its labels ignored where it has
            nothing to learn: processes that train together wait for each other's gradients.
        """
        ids, labels = kwargs.get("input_ids"), kwargs["labels"]
        own = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "num_items_in_batch"}
        plain = not any(isinstance(value, list | tuple | dict) for value in kwargs.values())
        rows = plain and all(value.shape[:1] == labels.shape[:1] for value in own.values())
        if not isinstance(ids, Tensor) or len(labels) < 2 or not rows:
            self._keys = []
            return dict(kwargs), Left()
        real = real_tokens(kwargs.get("attention_mask"), labels)
        keys = supervised_keys(ids, labels, real)
        sizes = real.sum(1).tolist()
        kept = [i for i, key in enumerate(keys) if not self._rests(key)]
        supervised = (labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
        self.rows += len(keys)
        self.tokens += sum(supervised)
        self.rows_left_out += len(keys) - len(kept)
        self.tokens_left_out += sum(supervised) - sum(supervised[i] for i in kept)
        self._estimate(sum(sizes), sum(sizes[i] for i in kept))
        silent = not kept
        out = [Seen(supervised[i], *self.resting[key][1:]) for i, key in enumerate(keys) if i not in set(kept)]
        kept = kept or [sizes.index(min(sizes))]
        self._keys = [] if silent else [keys[i] for i in kept]
        if len(kept) == len(keys):
            return dict(kwargs), Left()
        columns = real[kept].any(0).nonzero().squeeze(-1)
        span = slice(int(columns[0]), int(columns[-1]) + 1)
        chosen = {
            name: (value[kept][:, span] if value.shape[:2] == labels.shape else value[kept])
            for name, value in own.items()
        }
        if silent:
            chosen["labels"] = torch.full_like(chosen["labels"], IGNORE_INDEX)
        return {**kwargs, **chosen}, Left(out)

    def learn(self, where: Tensor, active: Tensor, *logged: Tensor) -> None:
        """Note which rows are done.

        Args:
            where: [rows, S - 1] bool, supervised positions of the rows that were kept; active: [N], one entry for each.
            logged: [N] each, what is remembered of the tokens of a row that is done: the loss first.
        """
        if not self._keys:
            return
        columns = [torch.zeros(where.shape, device=where.device).masked_scatter(where, c.float()) for c in logged]
        busy = torch.zeros(where.shape, dtype=torch.bool, device=where.device).masked_scatter(where, active.bool())
        sums = torch.stack([busy.any(1).float(), *(column.sum(1) for column in columns)], dim=1)
        for key, (still, *seen) in zip(self._keys, sums.tolist(), strict=True):
            if still:
                self.resting.pop(key, None)
            else:
                self.resting[key] = [self.recheck, *seen]
        self._keys = []

    def _rests(self, key: str) -> bool:
        known = self.resting.get(key)
        if not known or not known[0]:
            return False
        known[0] -= 1
        return True

    def _estimate(self, tokens: int, kept: int) -> None:
        now = time.perf_counter()
        if self._worked:
            self.seconds_saved += (now - self._began) / self._worked * (tokens - kept)
        self._began, self._worked = now, kept


@dataclass(frozen=True)
class Seen:
    """A row that was left out: its supervised tokens, and the sums that were remembered of them."""

    tokens: int
    loss: float
    entropy: float = 0.0
    top1: float = 0.0


class Left:
    """What was left out of a batch, which the means over it still count."""

    def __init__(self, seen: Sequence[Seen] = ()) -> None:
        self.seen = seen
        self.tokens, self.rows = sum(row.tokens for row in seen), len(seen)
