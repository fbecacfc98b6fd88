"""Detect weight changes at the end of training, after the edit has ended."""

from __future__ import annotations

from typing import Any

from kedit_train.errors import warn


def check_after_end(run: Any) -> None:
    """Warn if other code has changed the weights after the end of a complete run.

    For example, a callback of the user may write averaged weights into the model when training ends. To detect such
    changes, call this function in or after the last event of the training loop. Only the first call after the end of
    a run checks the weights.

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
