"""Runs of one callback that follow one another on the same model."""

from __future__ import annotations

import warnings
import weakref

from torch import nn

from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


def goes_on(model: weakref.ref[nn.Module] | None, run: EditRun) -> bool:
    """Whether this run trains the very model of the runs before it; a warning where those trained another.

    Args:
        model: what the run before trained; None before the first.
    """
    if model is None:
        return False
    if model() is run.model:
        return True
    warnings.warn(
        "sequential=True: this run's model is not the object that the runs before have trained, so "
        "nothing of those is held and a new sequence begins; train that object on, or make a new callback for this one",
        stacklevel=2,
    )
    return False


def check_known(run: EditRun, what: str) -> None:
    """Refuse a run that does not know its edits, which an argument needs."""
    if not run.edits:
        raise EditError(
            f"{what}, and nothing says what they are; add EditMetrics(edits), or say editing(edits=...) in a loop"
        )
