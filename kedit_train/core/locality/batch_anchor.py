"""The anchor on the training batch itself: what the model before the edit answers at the batch's supervised tokens.

Taken by content, at first sight of a row, with the scope's old values in place; kept as what the head reads there, so
that a row that comes again costs no second forward pass. The loss head adds the divergence to each token's loss.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.core.cache.hidden_state_store import HiddenStateStore
from kedit_train.core.cache.sequence_keys import forward_keys
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.divergence import Direction, token_divergence
from kedit_train.functional.labels import IGNORE_INDEX

# Of a forward call, what changes nothing about the hidden states of the supervised tokens.
_BESIDE = ("labels", "num_items_in_batch", "fused_lm_head", "use_cache")


class BatchAnchor:
    """The per-token term ``weight * divergence(before, now)`` at the supervised tokens of the training batches.

    Args:
        run: the edit, whose reference is kept as long as this is in use.
        direction: of the divergence; see :func:`kedit_train.functional.token_divergence`.
        dtype: in which answers are kept; None takes the one in which the head multiplies, which loses nothing.
        memory: bytes of answers to keep in memory; None knows no limit.
        folder: where answers beyond them go; None keeps no more, and rows without theirs cost a forward pass again.
    """

    def __init__(
        self,
        run: EditRun,
        *,
        weight: float,
        direction: Direction,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
        folder: Path | None = None,
    ) -> None:
        if any(isinstance(p, DTensor) for p in run.model.parameters()):
            raise EditError(
                "KLLocality(texts='batch'): the unedited model has to answer within the forward pass, for which its "
                "shards are not there (FSDP2); use DDP or one process, or give texts"
            )
        self.run, self.head = run, run.head()
        self.weight, self.dtype = weight, dtype
        self.direction: Direction = direction
        self.kept = HiddenStateStore(sys.maxsize if memory is None else memory, folder)
        self.rows = self.hits = 0
        self.seen_at = -1
        self._project_reference = run.reference_head()
        self._sum, self._tokens = torch.zeros(()), 0

    def reference_states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """What the head of the unedited model reads at the positions that predict supervised tokens, [N, d].

        Args:
            args, kwargs: of the training's own forward call; labels: [B, S], -100 where not supervised.
        """
        given = inspect.signature(self.head.model.forward).bind_partial(*args).arguments if args else {}
        inputs = {k: v for k, v in {**given, **kwargs}.items() if k not in _BESIDE and v is not None}
        inputs = {name: _per_row(name, value, len(labels)) for name, value in inputs.items()}
        keys = forward_keys(inputs, labels)
        missing = [i for i, key in enumerate(keys) if key not in self.kept and key not in keys[:i]]
        self.rows, self.hits = self.rows + len(keys), self.hits + len(keys) - len(missing)
        fresh = self._take(inputs, labels, missing) if missing else {}
        left_out = self.kept.left_out
        self.kept.add({keys[i]: answers for i, answers in fresh.items()})
        if self.kept.left_out > left_out == 0:
            warnings.warn(
                "KLLocality(texts='batch'): memory_limit is reached; rows beyond it cost a second forward pass every "
                "time (give store=, a folder for them, or a higher limit)",
                stacklevel=2,
            )
        found = {keys[i]: answers for i, answers in fresh.items()}
        known = [key for key in dict.fromkeys(keys) if key not in found]
        found |= dict(zip(known, self.kept.get(known) or (), strict=True))
        return torch.cat([found[key].to(labels.device) for key in keys])

    def divergence(self, logits: Tensor, reference_states: Tensor) -> Tensor:
        """Divergence [N], in nats, of logits [N, V] from the unedited model at ``reference_states`` [N, d]."""
        with torch.no_grad():
            reference = self.head.project(reference_states, self._project_reference)
        return token_divergence(reference, logits, direction=self.direction)

    def observe(self, divergence: Tensor) -> None:
        """Note what the tokens of one forward pass had, [N]."""
        self._sum = self._sum.to(divergence.device) + divergence.detach().sum(dtype=torch.float32)
        self._tokens, self.seen_at = self._tokens + len(divergence), self.run.step

    def metrics(self) -> dict[str, float]:
        """Mean divergence a token and the share of rows whose answers were there, since the last call."""
        if not self.rows:
            return {}
        found = {
            "edit/locality/batch_kl": float(self._sum) / max(1, self._tokens),
            "edit/locality/batch_hits": self.hits / self.rows,
            "edit/locality/batch_bytes": float(self.kept.memory_bytes + self.kept.disk_bytes),
        }
        self._sum, self._tokens, self.rows, self.hits = torch.zeros(()), 0, 0, 0
        return found

    @torch.no_grad()
    def _take(self, inputs: Mapping[str, Any], labels: Tensor, rows: list[int]) -> dict[int, Tensor]:
        """Answers [supervised tokens, d] of these rows of the batch, from one forward pass padded as the batch is."""
        if len(rows) < len(labels):
            inputs = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with self.run.unedited(), evaluation_mode(self.run.model):
            hidden = self.head.hidden(**inputs)
        dtype = self.dtype or self.head.compute_dtype(hidden)
        where = labels[rows, 1:].to(hidden.device) != IGNORE_INDEX
        return {row: hidden[n, :-1][where[n]].to(dtype) for n, row in enumerate(rows)}


def _per_row(name: str, value: Any, rows: int) -> Any:
    """An argument with one entry for each row of the batch, where it is a tensor."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool | int | float | str):
            return value
        raise EditError(
            f"KLLocality(texts='batch'): the model is called with {name}, a {type(value).__name__}, which cannot be "
            "compared from one epoch to the next; leave that argument out, or give texts"
        )
    # One row may come with tensors of another length (where its sequences begin, say).
    if rows == 1 or (value.ndim and value.shape[0] == rows):
        return value
    if value.ndim and value.shape[0] == 1:
        return value.expand(rows, *value.shape[1:])
    raise EditError(
        f"KLLocality(texts='batch'): the model is called with {name} of shape {tuple(value.shape)} for {rows} rows, so "
        "what belongs to which row is unknown; leave that argument out, or give texts"
    )
