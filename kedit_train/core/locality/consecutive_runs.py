"""Checks for callbacks that carry something over from one run to the next on the same model."""

from __future__ import annotations

import weakref

from torch import nn

from kedit_train.core.run import EditRun
from kedit_train.errors import EditError, warn


def continues_run(previous_model: weakref.ref[nn.Module] | None, run: EditRun) -> bool:
    """Return whether ``run`` trains the same model object as the run before it.

    Args:
        previous_model: the model of the previous run; None before the first run.
        run: the run that begins.

    Warns:
        UserWarning: the previous run trained another model, so what was kept from it cannot be used.
    """
    if previous_model is None:
        return False
    if previous_model() is run.model:
        return True
    warn(
        "sequential=True, but this run trains another model object than the run before it. What was kept from earlier "
        "runs is dropped, and this run counts as the first. Train the same model object, or use a new callback."
    )
    return False


def require_edits(run: EditRun, reason: str) -> None:
    """Raise an error if the run does not know its edits.

    Args:
        run: the run that begins.
        reason: which argument needs the edits and for what. It completes "<reason>, but the run does not know ...".
    """
    if not run.edits:
        raise EditError(
            f"{reason}, but the run does not know its edits; add EditMetrics(edits), or pass editing(edits=...)."
        )
