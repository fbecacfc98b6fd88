"""What a run needs from the training loop that it takes part in. The defaults are those of a plain loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import Any


class Host:
    """One training loop, as the run sees it.

    Args:
        owner: an object that lives exactly as long as the loop. Two loops are told apart by it.

    Attributes:
        name: what error messages call this kind of loop.
        announces_every_step: whether the loop calls ``run.steps.penalty()`` before the forward pass of every optimizer
            step, so that a step without that call is an error.
        releases_model: whether a step without that call means that the loop has abandoned the run, so that the run
            must be closed.
        uses_closures: whether the loop passes a closure to ``optimizer.step`` and calls
            ``run.steps.before_optimizer_step`` inside it, when the gradients are complete.
    """

    name = "plain loop"
    announces_every_step = True
    releases_model = True
    uses_closures = False

    def __init__(self, owner: object) -> None:
        self.owner = owner

    # -- what the loop knows

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
        """Return the loop's own tokenizer, or None."""
        return None

    def edits(self) -> Any | None:
        """Return the edits that the loop trains on, or None if it does not know them as edits."""
        return None

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context in which the loop runs its forward pass, for example autocast."""
        return nullcontext()

    def summed_micro_batches(self) -> int:
        """Return how many micro-batch losses, over all processes, the loop adds up for one step without averaging."""
        return 1

    # -- resuming

    @property
    def resumed(self) -> bool:
        """Whether the weights were loaded from a checkpoint of this edit, so that they are not the reference values."""
        return False

    def saved_state(self) -> dict[str, Any] | None:
        """Return what ``run.state()`` had put into that checkpoint, or None."""
        return None

    # -- what the loop cannot support

    def unsupported_reason(self) -> str | None:
        """Return why constraints would not hold in this loop, or None if they do."""
        return None

    def loss_unsupported_reason(self) -> str | None:
        """Return why a callback cannot replace the loss in this loop, or None if it can."""
        return None

    def gradient_error(self) -> str | None:
        """Return what is wrong with the gradients just before a step, or None."""
        return None

    def unannounced_step_error(self) -> str:
        """Return the error message for an optimizer step that was not announced."""
        return (
            "this model belongs to an edit that another trainer set up and did not finish, or the first callback was "
            "removed from this trainer; the model has now been released and its requires_grad flags restored: create "
            "the trainer again."
        )

    # -- what the run tells the loop

    def after_optimizer_step(self, run: Any) -> None:
        """React to an optimizer step, after which the constraints hold again."""

    def stop(self) -> None:
        """End training after this step."""

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Log metrics at the current step.

        Args:
            metrics: key -> value.
            last: whether the loop will have no further log event.
        """

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table at the current step."""

    def wandb_run(self) -> Any | None:
        """Return the W&B run that the loop logs to; None on processes that do not log, and without W&B."""
        return None

    def log_file(self, path: str | PathLike[str], kind: str) -> None:
        """Upload a file as a W&B artifact of type ``kind``, if the loop logs to W&B."""
        run = self.wandb_run()
        if run is not None:
            run.log_artifact(str(path), name=f"{kind}-{run.id}", type=kind)
