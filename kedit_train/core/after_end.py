"""Detect weight changes at the end of training, after the edit has ended."""

from __future__ import annotations

from typing import Any

from kedit_train.errors import warn


def check_after_end(run: Any) -> None:
    """Warn if other code has changed the weights after the end of a complete run. Later calls do nothing.

    Other code can still change the weights when training ends. For example, a callback of the user may write averaged
    weights into the model. Therefore this function is called in or after the last event of the training loop.

    Args:
        run: an :class:`~kedit_train.core.run.EditRun`.
    """
    integrity = run.steps.integrity
    name = integrity.changed() if integrity.ended else None
    integrity.ended = False
    if name is not None:
        warn(
            f"other code has changed {name} after the edit had ended. The new weights may break the constraints of the "
            "edit. The delta file and the scores describe the weights before this change. A possible cause is a "
            "callback that writes averaged weights when training ends; put that callback before the callbacks of "
            "kedit_train, or remove it."
        )
