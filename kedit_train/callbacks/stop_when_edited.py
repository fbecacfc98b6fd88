"""Did it take? Then stop: every further step costs locality and buys nothing."""

from __future__ import annotations

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


class StopWhenEdited(EditCallback):
    """End training once the edits are learned.

    Args:
        reliability: stop when ``EditMetrics`` measured at least this reliability; it has to be on the list, with
            ``every_n_steps`` set. None turns this off.
        idle_steps: stop after this many optimizer steps in a row in which ``TokenSmoothing`` found no active token;
            the number of batches in an epoch means that a whole epoch had nothing to teach. None turns this off.
    """

    # After EditMetrics, whose scores it reads.
    order = 90

    def __init__(self, reliability: float | None = 1.0, idle_steps: int | None = None) -> None:
        if reliability is None and idle_steps is None:
            raise EditError("StopWhenEdited: reliability and idle_steps are both None, so it would never stop a run")
        if reliability is not None and not 0.0 < reliability <= 1.0:
            raise EditError(f"StopWhenEdited: reliability={reliability} is no share in (0, 1]")
        if idle_steps is not None and idle_steps < 1:
            raise EditError(f"StopWhenEdited: idle_steps={idle_steps} is no number of steps (1 or more)")
        self.reliability, self.idle_steps = reliability, idle_steps

    def attach(self, run: EditRun) -> None:
        names = {type(callback).__name__: callback for callback in run.callbacks}
        if self.reliability is not None and not getattr(names.get("EditMetrics"), "every_n_steps", 0):
            raise EditError(
                "StopWhenEdited(reliability=...) reads what EditMetrics measures; add EditMetrics(every_n_steps=20)"
            )
        if self.idle_steps is not None and not getattr(names.get("TokenSmoothing"), "epsilon", 0.0):
            raise EditError("StopWhenEdited(idle_steps=...) counts active tokens; add TokenSmoothing(epsilon=0.05)")
        self._idle = 0

    def state(self) -> dict[str, int]:
        return {"idle": getattr(self, "_idle", 0)}

    def load_state(self, state: dict[str, int]) -> None:
        self._idle = state["idle"]

    def after_step(self, run: EditRun) -> None:
        if self.reliability is not None and run.scores.get("edit/reliability", 0.0) >= self.reliability:
            run.stop()
        if self.idle_steps is not None:
            self._idle = self._idle + 1 if run.scores.get("edit/tokens/active_now") == 0 else 0
            if self._idle >= self.idle_steps:
                run.stop()

    def __repr__(self) -> str:
        return f"StopWhenEdited(reliability={self.reliability}, idle_steps={self.idle_steps})"
