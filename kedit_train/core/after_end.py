"""Detect weight changes at the end of training, after the edit has ended."""

from __future__ import annotations

from typing import Any

from kedit_train.errors import warn


def check_after_end(run: Any) -> None:
    """Warn if other code has changed the weights after the end of the edit.

    For example, a user's callback may write averaged weights into the model when training ends. Call this function in
    the last event of the training loop, or after the loop. Only the first call after the end of the edit checks the
    weights.

    Args:
        run: an :class:`~kedit_train.core.run.EditRun`.
    """
    integrity = run.steps.integrity
    name = integrity.changed() if integrity.ended else None
    integrity.ended = False
    if name is not None:
        warn(
            f"other code has changed {name} after the edit had ended. The constraints, the delta file and the scores "
            "of the edit are valid only for the weights before this change. If a callback writes averaged weights when "
            "training ends, put this callback before the callbacks of kedit_train, or remove it."
        )
