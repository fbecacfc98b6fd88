"""Detect weight changes at the end of training, after the edit has ended."""

from __future__ import annotations

from typing import Any

from kedit_train.errors import warn


def check_after_end(run: Any) -> None:
    """Warn if other code has changed the weights after the end of a complete run. Later calls do nothing.

    Hosts call this function at the last moment at which the training loop calls them. For example, a callback of the
    user may write averaged weights into the model when training ends.

    Args:
        run: an :class:`~kedit_train.core.run.EditRun`.
    """
    integrity = run.steps.integrity
    name = integrity.changed() if integrity.ended else None
    integrity.ended = False
    if name is not None:
        warn(
            f"other code has changed {name} after the edit had ended, at the end of training, so the constraints of "
            "this edit may be broken, and the delta file and the scores are those of the weights before the change "
            "(possible cause: a callback that writes averaged weights); list this callback before the callbacks of "
            "kedit_train, or remove it."
        )
