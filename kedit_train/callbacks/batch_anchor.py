"""What must stay? The predictions on the training batches themselves, apart from what the edits change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedit_train.arguments import at_least, check_arguments, one_of
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.batch_anchor import AnchorTerm
from kedit_train.core.locality.reference_cache import ReferenceCache
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.divergence import Direction


class BatchAnchor(EditCallback):
    """Add the divergence from the model before the edit to the loss of every supervised token.

    The loss of a token becomes ``loss + weight * divergence``, averaged as the host averages its loss. The logged loss
    contains the term. It needs no texts.

    The reference hidden states of an example are computed when it is first seen: one more forward pass, with the values
    before the edit in place. They are stored by the content of the example, so later epochs need no second forward
    pass. A packed row counts as one example. With DDP each process stores the examples that it has seen. Without
    :class:`ParameterScope` in full fine-tuning, a copy of all weights is kept for it.

    Args:
        weight: factor of the divergence beside the loss of a token.
        direction: "forward" is KL(before || now), "reverse" is KL(now || before), "jsd" is the Jensen-Shannon
            divergence.
        cache: where the reference hidden states are kept: a directory or a :class:`ReferenceCache`. None keeps all of
            them in memory.

    Raises:
        EditError: an argument is out of bounds; later, the host computes its loss in a way that cannot be extended, or
            FSDP2 shards the model.

    References:
        Anchored Supervised Fine-Tuning, arXiv 2509.23753.

    Example:
        >>> from kedit_train import editing, world
        >>> from kedit_train.callbacks import BatchAnchor, ParameterScope
        >>> model, tokenizer = world.load()
        >>> batch = tokenizer("The old baker found a coin.", return_tensors="pt")
        >>> callbacks = [ParameterScope(layers=0.7, modules="mlp.down_proj"), BatchAnchor(weight=0.5)]
        >>> with editing(model, callbacks, tokenizer=tokenizer) as edit:
        ...     edit.before_step()
        ...     loss = model(**batch, labels=batch["input_ids"]).loss
        >>> loss.requires_grad
        True
    """

    order = 30
    anchors = True
    duplicate_hint = "keep one, with the sum of both weights"

    def __init__(
        self,
        weight: float = 1.0,
        *,
        direction: Direction = "forward",
        cache: str | Path | ReferenceCache | Mapping[str, Any] | None = None,
    ) -> None:
        check_arguments(
            self,
            weight=(weight, at_least(0)),
            direction=(direction, one_of(("forward", "reverse", "jsd"))),
        )
        self.weight = weight
        self.direction: Direction = direction
        self.cache = ReferenceCache.of(cache)
        self._term: AnchorTerm | None = None

    def provides(self) -> set[str]:
        return {"batch_anchor"}

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        reason = run.host.loss_unsupported_reason()
        if reason:
            raise EditError(f"the loss of this {run.host.name} run cannot be extended: {reason}")

    def attach(self, run: EditRun) -> None:
        self._term = AnchorTerm(run, weight=self.weight, direction=self.direction, cache=self.cache)
        run.loss_head().term = self._term

    def skip_step(self, run: EditRun) -> bool:
        if self._term is not None and self._term.last_step != run.step:
            raise EditError(
                "the model was not called with labels= since the last optimizer step, so there was no batch to anchor; "
                "call model(..., labels=labels) in the training step and use the loss that it returns."
            )
        return False

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the mean divergence per token in nats, the share of examples found in the cache, and its bytes."""
        return {} if self._term is None else self._term.metrics()

    def detach(self, run: EditRun) -> None:
        if self._term is not None:
            self._term.store.close()
        self._term = None

    def __repr__(self) -> str:
        return f"BatchAnchor(weight={self.weight}, direction={self.direction!r})"
