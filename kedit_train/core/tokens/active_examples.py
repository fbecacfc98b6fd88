"""Leave learned examples out of the training batches, and check these examples again from time to time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kedit_train.core.cache.sequence_keys import is_per_example, real_tokens, supervised_keys
from kedit_train.core.tokens.interfaces import LeftOut, LeftOutExample
from kedit_train.functional.labels import IGNORE_INDEX


class ActiveExamples:
    """An example filter that leaves learned examples out of the batches.

    An example is identified by its token ids and labels without padding, and by its images. So the filter recognizes an
    example in every batch.

    Args:
        recheck: number of times that a learned example is left out before the model runs on it again.
        probability: an example counts as learned when the model gives each of its supervised tokens at least this
            probability. With None, it counts as learned when the objective no longer counts any of its tokens in the
            loss.

    Attributes:
        learned: dict from the key of a learned example to a list of numbers. The first number is how many more times
            the example will be left out. The other numbers are sums over the example's tokens in its last forward pass:
            the loss and, with TRL, the entropy and the number of correct tokens.
        seconds_saved: estimated training time saved so far. For the estimate, :meth:`select` counts the tokens that it
            leaves out, and measures the time per computed token.
    """

    def __init__(self, recheck: int, probability: float | None) -> None:
        self.recheck, self.probability = recheck, probability
        self.learned: dict[str, list[float]] = {}
        self.seconds_saved: float = 0.0
        self._started, self._computed_tokens = 0.0, 0
        self._keys: list[str] = []
        self._reset_counts()

    def select(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], LeftOut]:
        """Remove learned examples from the arguments of a forward call.

        If the first or last columns of the batch then contain only padding, these columns are removed too.

        Args:
            kwargs: arguments of the call, with ``input_ids`` and ``labels`` [batch, length]. No example is left out if
                the batch has only one example, or if another argument cannot be divided into examples.

        Returns:
            The reduced arguments, and the examples that were left out. If all examples are learned, the shortest of
            them stays in the batch as a placeholder, and all of its labels are set to the ignore index. The placeholder
            is needed because every process of a distributed run must compute gradients.
        """
        ids, labels = kwargs.get("input_ids"), kwargs["labels"]
        tensors = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "num_items_in_batch"}
        nested = any(isinstance(value, list | tuple | dict) for value in kwargs.values())
        per_example = not nested and all(is_per_example(k, v, len(labels)) for k, v in tensors.items())
        if not isinstance(ids, Tensor) or len(labels) < 2 or not per_example:
            self._keys = []
            return dict(kwargs), LeftOut()
        real = real_tokens(kwargs.get("attention_mask"), labels)
        # Two examples with the same text and different images are different examples.
        images = [v for k, v in tensors.items() if k != "attention_mask" and v.shape[:2] != labels.shape]
        keys = supervised_keys(ids, labels, real, images)
        lengths = real.sum(1).tolist()
        kept = [i for i, key in enumerate(keys) if not self._leave_out(key)]
        supervised = (labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
        self.examples += len(keys)
        self.tokens += sum(supervised)
        self.examples_left_out += len(keys) - len(kept)
        self.tokens_left_out += sum(supervised) - sum(supervised[i] for i in kept)
        self._estimate_time(sum(lengths), sum(lengths[i] for i in kept))
        left_out = tuple(
            LeftOutExample(supervised[i], *self.learned[key][1:]) for i, key in enumerate(keys) if i not in set(kept)
        )
        all_learned = not kept
        kept = kept or [lengths.index(min(lengths))]
        self._keys = [] if all_learned else [keys[i] for i in kept]
        if len(kept) == len(keys):
            return dict(kwargs), LeftOut()
        columns = real[kept].any(0).nonzero().squeeze(-1)
        span = slice(int(columns[0]), int(columns[-1]) + 1)
        reduced = {
            name: (value[kept][:, span] if value.shape[:2] == labels.shape else value[kept])
            for name, value in tensors.items()
        }
        if all_learned:
            reduced["labels"] = torch.full_like(reduced["labels"], IGNORE_INDEX)
        return {**kwargs, **reduced}, LeftOut(left_out, (labels.shape, kept, span))

    def record(self, where: Tensor, active: Tensor, *sums: Tensor) -> None:
        """Update :attr:`learned` after a forward pass. Entries of examples that were left out do not change.

        Args:
            where: [examples, length - 1] bool, the supervised positions.
            active: [N] bool, True for each of the N supervised positions whose token is not learned yet.
            sums: tensors [N] with one value per supervised position: the loss and, with TRL, the entropy and whether
                the label was the most probable token. This method stores the sums of these values for each learned
                example.
        """
        if not self._keys:
            return
        columns = [torch.zeros(where.shape, device=where.device).masked_scatter(where, s.float()) for s in sums]
        busy = torch.zeros(where.shape, dtype=torch.bool, device=where.device).masked_scatter(where, active.bool())
        table = torch.stack([busy.any(1).float(), *(column.sum(1) for column in columns)], dim=1)
        for key, (is_active, *totals) in zip(self._keys, table.tolist(), strict=True):
            if is_active:
                self.learned.pop(key, None)
            else:
                self.learned[key] = [self.recheck, *totals]
        self._keys = []

    def metrics(self) -> dict[str, float]:
        """Return the fractions of examples and tokens left out since the last call, and the seconds saved so far."""
        if not self.examples:
            return {}
        shares = {
            "edit/active/examples_left_out": self.examples_left_out / self.examples,
            "edit/active/tokens_left_out": self.tokens_left_out / max(1, self.tokens),
            "edit/active/seconds_saved": self.seconds_saved,
        }
        self._reset_counts()
        return shares

    def _reset_counts(self) -> None:
        self.examples = self.examples_left_out = self.tokens = self.tokens_left_out = 0

    def _leave_out(self, key: str) -> bool:
        entry = self.learned.get(key)
        if not entry or not entry[0]:
            return False
        entry[0] -= 1
        return True

    def _estimate_time(self, tokens: int, computed: int) -> None:
        now = time.perf_counter()
        if self._computed_tokens:
            self.seconds_saved += (now - self._started) / self._computed_tokens * (tokens - computed)
        self._started, self._computed_tokens = now, computed
