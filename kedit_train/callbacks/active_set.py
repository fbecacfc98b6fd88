"""ActiveSet: leave learned edits out of the training batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedit_train.arguments import check_arguments, integer_from, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun
from kedit_train.core.tokens.active_examples import ActiveExamples


class ActiveSet(EditCallback):
    """Save time by leaving learned edits out of the training batches.

    By default, an edit is learned if the loss of each of its target tokens is at most ``epsilon``. This threshold is an
    argument of the callback that computes the token loss, such as :class:`TokenSmoothing`. A token with a loss of at
    most ``epsilon`` has no gradient, so a learned edit costs a forward and a backward pass, but does not change the
    weights. ``ActiveSet`` removes learned edits from the batch inside the model's forward call, so it works with any
    data loader.

    The loss is averaged as if no edit had been removed, so the gradient of the remaining edits does not change. For a
    removed edit, the average uses the loss from the last forward pass on this edit. TRL's entropy and token accuracy
    are averaged in the same way.

    Training on other edits can undo a learned edit. Therefore, after an edit was left out ``recheck`` times, the model
    runs on it again.

    If a batch has only one example, ``ActiveSet`` leaves nothing out. With packing, an example is a packed sequence of
    several edits. ``ActiveSet`` can leave out a packed sequence only if the sequence has the same content in every
    epoch.

    Args:
        recheck: how many times a learned edit is left out before the model runs on it again.
        probability: an edit is learned when each of its target tokens has at least this probability, in (0, 1). With
            None (default), an edit is learned when the loss of each target token is at most the ``epsilon`` of the
            callback that computes the token loss.

    Raises:
        EditError: the run has no token loss, the token loss has ``epsilon=0`` while ``probability`` is None, or the run
            has a ``BatchAnchor``.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import ActiveSet, ParameterScope, TokenSmoothing
        >>> from kedit_train.data.tokenization import collate
        >>> model, tokenizer = world.load()
        >>> batch = collate(EditDataset.load("world", limit=4).encode(tokenizer), pad_id=tokenizer.pad_token_id)
        >>> callbacks = [ParameterScope(layers=0.7), TokenSmoothing(), ActiveSet(recheck=2)]
        >>> with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=15) as edit:
        ...     optimizer = torch.optim.Adam(edit.parameters(), lr=5e-3)
        ...     for _ in range(15):
        ...         edit.before_step()
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> edit.history[0]["edit/active/examples_left_out"] > 0
        True
    """

    # ActiveSet comes after the token loss, which creates the loss head.
    order = 25
    duplicate_hint: str | None = "one ActiveSet handles all edits, so remove the second one"

    def __init__(self, recheck: int = 4, *, probability: float | None = None) -> None:
        check_arguments(self, recheck=(recheck, integer_from(1)), probability=(probability, optional(within("(0, 1)"))))
        self.recheck = recheck
        self.probability = probability
        self._examples: ActiveExamples | None = None

    def requires(self) -> Sequence[Requirement]:
        loss = "a token loss is needed to find the learned edits; add TokenSmoothing()."
        clip = "probability must be given if the token loss has epsilon=0; pass probability, or set epsilon > 0."
        needed = [Requirement(("token_loss",), loss)]
        return needed if self.probability is not None else [*needed, Requirement(("token_clip",), clip)]

    def conflicts(self) -> Sequence[Requirement]:
        message = "BatchAnchor would not anchor the edits that ActiveSet leaves out; remove ActiveSet or BatchAnchor."
        return (Requirement(("batch_anchor",), message),)

    def prepare(self, run: EditRun) -> None:
        run.causal_model()

    def attach(self, run: EditRun) -> None:
        self._examples = run.loss_head().filter = ActiveExamples(self.recheck, self.probability)

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the fractions of examples and tokens left out since the last call, and the seconds saved so far."""
        return {} if self._examples is None else self._examples.metrics()

    def state(self) -> dict[str, Any]:
        return {"learned": dict(self._examples.learned) if self._examples is not None else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._examples is not None:
            self._examples.learned = dict(state["learned"])

    def detach(self, run: EditRun) -> None:
        self._examples = None

    def __repr__(self) -> str:
        return f"ActiveSet(recheck={self.recheck}, probability={self.probability})"
