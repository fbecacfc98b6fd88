"""What an edit may ask of the training loop it has joined. The defaults are a plain loop's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import Any


class Host:
    """One training loop. ``owner`` tells one loop from the next: the object that lives exactly as long as it does."""

    name = "plain loop"

    def __init__(self, owner: object) -> None:
        self.owner = owner

    @property
    def resumed(self) -> bool:
        """The weights come from a checkpoint of an edit under way, so they are no longer the pre-edit ones."""
        return False

    def saved_state(self) -> dict[str, Any] | None:
        """What :meth:`EditRun.state` gave to the checkpoint that the loop has resumed from."""
        return None

    @property
    def is_main(self) -> bool:
        """This process is the one that prints, logs and writes."""
        return True

    @property
    def steps(self) -> int | None:
        """Optimizer steps that the loop intends to take, where it knows."""
        return None

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps of an epoch, where the loop knows."""
        return None

    def tokenizer(self) -> Any | None:
        """The tokenizer that the loop itself holds."""
        return None

    def edits(self) -> Any | None:
        """The edits that the loop trains on, where it holds them as such."""
        return None

    def loss_shares(self) -> int:
        """Micro-batches, over all processes, whose losses the host adds up without dividing, for one optimizer step."""
        return 1

    # Whether every optimizer step is announced to the run (through EditRun.penalty) before its forward pass.
    announces_steps = True
    # Whether an unannounced step means that the run was left behind by its loop and has to let the model go.
    releases = True

    # Whether the loop hands the optimizer a closure and tells the run, from within it, when gradients are complete.
    steps_with_closures = False

    def unannounced(self) -> str:
        """What to do where an optimizer step came unannounced."""
        return (
            "this model is part of an edit that another trainer set up and did not finish, or from which this one has "
            "removed its leading callback; it has now been released, with everything that was frozen: build the "
            "trainer again"
        )

    def refused(self) -> str | None:
        """Why no constraint could be kept in this loop, if so."""
        return None

    def check_gradients(self) -> str | None:
        """What is wrong with the gradients of an announced step that is about to be taken, if anything."""
        return None

    def objective_refused(self) -> str | None:
        """Why a per-token objective would be void or wrong in this loop, if so."""
        return None

    def forward_context(self) -> AbstractContextManager[Any]:
        """Under what the loop runs its own forward pass (autocast and the like)."""
        return nullcontext()

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Record metrics at the current step; ``last`` where no further log event of the loop is to be expected."""

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table at the current step."""

    def wandb_run(self) -> Any | None:
        """The W&B run that the loop logs into; None on processes that do not log, and where there is none."""
        return None

    def log_file(self, path: str | PathLike[str], kind: str) -> None:
        """Keep a file with the run, as an artifact of that kind, where the loop logs into W&B."""
        run = self.wandb_run()
        if run is not None:
            run.log_artifact(str(path), name=f"{kind}-{run.id}", type=kind)

    def stop(self) -> None:
        """End training after this step."""

    def stepped(self, run: Any) -> None:
        """The optimizer has stepped and the constraints hold again."""
