"""Connect a training loop with the run of an edit. The defaults describe a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import Any


class Host:
    """Connects one training loop with the run of an edit (:class:`~kedit_train.core.run.EditRun`).

    Args:
        owner: an object that lives exactly as long as the training loop and identifies the loop.

    Attributes:
        name: the name of this kind of loop in error messages.
        announces_every_step: whether the loop calls ``run.steps.penalty()`` before the forward pass of every optimizer
            step. If True, a step without this call raises an error. If False, such a step raises an error only if a
            callback adds a penalty, or if training has not started.
        releases_model: whether the error about a missing ``penalty()`` call also closes the run. True for loops that a
            user may abandon. An abandoned loop does not close its run, and the step usually comes from another loop
            that trains the same model.
        uses_closures: whether the loop passes a closure to ``optimizer.step``. If True, the closure calls
            ``run.steps.before_optimizer_step`` when the gradients are complete.
    """

    name = "plain loop"
    announces_every_step = True
    releases_model = True
    uses_closures = False

    def __init__(self, owner: object) -> None:
        self.owner = owner

    # -- information about the loop

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints, logs and writes files."""
        return True

    @property
    def steps(self) -> int | None:
        """Number of optimizer steps that the loop will take; None if unknown."""
        return None

    @property
    def epoch_steps(self) -> int | None:
        """Number of optimizer steps in one epoch; None if unknown."""
        return None

    def tokenizer(self) -> Any | None:
        """Return the tokenizer of the training loop, or None if the loop has none."""
        return None

    def edits(self) -> Any | None:
        """Return the edits that the loop trains on, or None if the loop has no ``Edit`` records."""
        return None

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context in which the loop runs its forward pass, for example autocast."""
        return nullcontext()

    def summed_micro_batches(self) -> int:
        """Return the number of micro-batch losses that the loop sums (and does not average) in one optimizer step.

        The number includes the micro-batches of all processes. It is 1 if the loop averages the losses.
        """
        return 1

    @property
    def reads_logits(self) -> bool:
        """Whether the loop reads the logits of training steps, in addition to the loss that the model returns."""
        return False

    def is_editing(self, run: Any) -> bool:
        """Return whether the loop still uses ``run``. If True, another loop must not close the run."""
        # If training has not started, the user may have abandoned the trainer after setting it up.
        return run.has_started

    # -- resuming

    @property
    def resumed(self) -> bool:
        """Whether the current weights come from a checkpoint of this edit, and not from the unedited model."""
        return False

    def saved_state(self) -> dict[str, Any] | None:
        """Return the result of ``run.state()`` from the checkpoint that training resumes from, or None."""
        return None

    # -- what the loop cannot support

    def unsupported_reason(self) -> str | None:
        """Return why this loop cannot enforce constraints on the weights, or None if it can."""
        return None

    def loss_unsupported_reason(self) -> str | None:
        """Return why a callback cannot replace the loss in this loop, or None if it can."""
        return None

    def gradient_error(self) -> str | None:
        """Check the gradients just before an optimizer step. Return an error message if they are wrong, else None."""
        return None

    def unannounced_step_error(self) -> str:
        """Return the error message for an optimizer step without a preceding ``run.steps.penalty()`` call."""
        return (
            "this model belongs to an edit that another trainer set up and did not finish, or the first callback was "
            "removed from this trainer. The edit has now been closed and the requires_grad flags of the model have "
            "been restored; create the trainer again."
        )

    # -- calls from the run to the loop

    @property
    def loads_best_weights(self) -> bool:
        """Whether the loop loads the weights of its best checkpoint when training ends."""
        return False

    def disable_clipping(self) -> tuple[str, float] | None:
        """Turn off the gradient clipping of the trainer.

        Returns:
            The name of the trainer's argument and its value, for example ("max_grad_norm", 1.0). None if the trainer
            does not clip gradients.
        """
        return None

    def restore_clipping(self) -> None:
        """Turn gradient clipping on again, if :meth:`disable_clipping` has turned it off."""

    def after_optimizer_step(self, run: Any) -> None:
        """React to an optimizer step, after the constraints have been applied to the new weights."""

    def stop(self) -> None:
        """End training after this step."""

    def show_progress(self, line: str) -> None:
        """Print a line about the progress of a long run, if no progress bar shows it."""

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Log metrics at the current step.

        Args:
            metrics: key -> value.
            last: whether this is the last log event of the loop.
        """

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table at the current step. ``columns`` contains the names of the columns."""

    def wandb_run(self) -> Any | None:
        """Return the W&B run that the loop logs to, or None if this process does not log to W&B."""
        return None

    def log_file(self, path: str | PathLike[str], kind: str) -> None:
        """Upload a file as a W&B artifact of type ``kind``, if the loop logs to W&B."""
        run = self.wandb_run()
        if run is not None:
            run.log_artifact(str(path), name=f"{kind}-{run.id}", type=kind)
