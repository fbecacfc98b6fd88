"""Nothing but time: edits that are learned are left out of the batches, and looked at again now and then."""

from __future__ import annotations

from typing import Any

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.run import EditRun
from kedit_train.core.tokens.active_examples import ActiveRows
from kedit_train.errors import EditError


class ActiveSet(EditCallback):
    """Leave an edit out of the next rounds once no target token of it is active, and look again every few.

    A token within ``TokenSmoothing``'s clip has no gradient, so that an edit of such tokens costs a forward and a
    backward pass for nothing. It is taken out of the batch inside the model's own forward call, whatever loop makes the
    batches; means over the batch still count it, so that the gradient of those that stay is what it was, and logged
    losses (and TRL's entropy and token accuracy) hold what it had when it was last looked at. What it
    cannot see is an edit that other edits push out again: that is learned at the next look.

    Works on rows of a batch: with one row a batch, and with examples packed into rows that differ from epoch to epoch,
    nothing is left out. It needs ``TokenSmoothing``, and no anchor on the batch (``KLLocality(texts="batch")``).

    Args:
        recheck: rounds that a learned edit is left out before it is looked at again.
        probability: call an edit learned when each of its target tokens has at least this probability; by default when
            none is active under the clip.

    Example:
        >>> SFTTrainer(model, args, train_dataset=data, callbacks=[ParameterScope(), TokenSmoothing(), ActiveSet()])
    """

    # After TokenSmoothing, whose head it works through.
    order = 25
    single = "one knows every edit: keep one"

    def __init__(self, recheck: int = 4, probability: float | None = None) -> None:
        if recheck < 1:
            raise EditError(f"ActiveSet: recheck={recheck} is no number of rounds (1 or more)")
        if probability is not None and not 0.0 < probability < 1.0:
            raise EditError(f"ActiveSet: probability={probability} is none in (0, 1)")
        self.recheck, self.probability = recheck, probability
        self._rows: ActiveRows | None = None

    def prepare(self, run: EditRun) -> None:
        run.causal()

    def attach(self, run: EditRun) -> None:
        smoothing: Any = {type(callback).__name__: callback for callback in run.callbacks}.get("TokenSmoothing")
        if smoothing is None:
            raise EditError("ActiveSet asks which tokens are learned; add TokenSmoothing(), which knows")
        if self.probability is None and smoothing.epsilon == 0.0:
            raise EditError(
                "ActiveSet: with TokenSmoothing(epsilon=0.0) every token is active for ever; give it an epsilon, or "
                "ActiveSet a probability"
            )
        if any(callback.anchors for callback in run.callbacks):
            raise EditError(
                "ActiveSet would leave edits out that KLLocality(texts='batch') has to hold; give KLLocality texts, or "
                "leave ActiveSet out"
            )
        self._rows = run.loss_head().filter = ActiveRows(self.recheck, self.probability)

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Shares of rows and supervised tokens left out since the last call, and an estimate of the seconds saved."""
        rows = self._rows
        if rows is None or not rows.rows:
            return {}
        found = {
            "edit/active/rows_left_out": rows.rows_left_out / rows.rows,
            "edit/active/tokens_left_out": rows.tokens_left_out / max(1, rows.tokens),
            "edit/active/seconds_saved": rows.seconds_saved,
        }
        rows.rows = rows.rows_left_out = rows.tokens = rows.tokens_left_out = 0
        return found

    def state(self) -> dict[str, Any]:
        return {"resting": dict(self._rows.resting) if self._rows is not None else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._rows is not None:
            self._rows.resting = dict(state["resting"])

    def detach(self, run: EditRun) -> None:
        self._rows = None

    def __repr__(self) -> str:
        return f"ActiveSet(recheck={self.recheck}, probability={self.probability})"
