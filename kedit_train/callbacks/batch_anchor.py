"""BatchAnchor: penalize changed predictions on the training batches, compared with the model before the edit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedit_train.arguments import at_least, check_arguments, one_of
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.batch_anchor import AnchorTerm
from kedit_train.core.locality.divergence_penalty import CAPABILITY, DivergencePenalty
from kedit_train.core.locality.reference_cache import ReferenceCache
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.divergence import Direction


class BatchAnchor(EditCallback):
    """Penalize changed predictions on the training tokens, compared with the model before the edit.

    For each token with a label, the divergence from the model before the edit is multiplied by ``weight`` and added to
    the loss of the token. The resulting token losses are averaged in the same way as the original losses. The logged
    loss includes the divergence. ``BatchAnchor`` needs no texts other than the training data.

    ``BatchAnchor`` needs the hidden states of the model before the edit (reference hidden states). When an example
    occurs for the first time, an additional forward pass computes them. They are then stored, so later epochs need no
    additional forward pass. With packing, each packed sequence counts as one example. With DDP, each process stores the
    hidden states of its own examples. In full fine-tuning without :class:`ParameterScope`, a copy of all weights from
    before the edit is kept for the additional forward passes.

    Args:
        weight: factor of the divergence in the loss of a token.
        direction: the divergence to use, where ``before`` is the model before the edit and ``now`` is the model in
            training. "forward" is KL(before || now), "reverse" is KL(now || before), "jsd" is the Jensen-Shannon
            divergence.
        cache: where to store the reference hidden states: a directory or a :class:`ReferenceCache`. Hidden states stay
            in memory up to ``memory_limit`` of the :class:`ReferenceCache`. Only hidden states above this limit are
            written to the directory. None keeps all hidden states in memory.

    Raises:
        EditError: an argument is out of bounds, the divergence cannot be added to the loss of the trainer, or FSDP2
            shards the model.

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
    duplicate_hint: str | None = "keep one BatchAnchor, and set its weight= to the sum of the two weights"

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
        self.cache: ReferenceCache = ReferenceCache.of(cache)
        self._term: AnchorTerm | None = None

    def provides(self) -> set[str]:
        return {"batch_anchor", "edit/locality/batch_kl", CAPABILITY}

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        reason = run.host.loss_unsupported_reason()
        if reason:
            raise EditError(
                f"the penalty on changed predictions cannot be added to the loss of this {run.host.name} run: {reason}."
            )

    def attach(self, run: EditRun) -> None:
        # A ForgettingBudget may change the weight during training.
        penalty = DivergencePenalty("batch", self.weight)
        run.penalties.append(penalty)
        self._term = AnchorTerm(run, penalty, direction=self.direction, cache=self.cache)
        run.loss_head().term = self._term

    def skip_step(self, run: EditRun) -> bool:
        # If several optimizers share a step, the check was made when the first of them stepped.
        if self._term is not None and self._term.last_step != run.step and not run.steps.is_shared:
            raise EditError(
                "the model was not called with labels= since the last optimizer step, so no penalty was added to the "
                "loss; call model(..., labels=labels) in the training step, and train on the loss that it returns."
            )
        return False

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the metrics of the divergence since the last call.

        The metrics are the mean divergence per token in nats, the fraction of examples whose reference hidden states
        were already stored, and the size of the stored hidden states in bytes.
        """
        return {} if self._term is None else self._term.metrics()

    def detach(self, run: EditRun) -> None:
        if self._term is not None:
            self._term.store.close()
        self._term = None

    def __repr__(self) -> str:
        return f"BatchAnchor(weight={self.weight}, direction={self.direction!r})"
