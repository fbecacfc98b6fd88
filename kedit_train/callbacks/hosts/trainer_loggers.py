"""Send edit/* metrics to the loggers of a transformers trainer, such as TensorBoard, and to its table in a notebook."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

# The metrics that the trainer's table in a notebook shows, and the names of their columns.
COLUMNS = {"edit/reliability": "Reliability", "edit/generality": "Generality", "edit/locality": "Locality"}


class TrainerLoggers:
    """The logger callbacks of one trainer. The callback of W&B is left out.

    The trainer calls its loggers before the user's callbacks. At this time, the logged row does not contain the
    ``edit/*`` metrics yet. :meth:`send` therefore calls the loggers a second time at the same step, with only these
    metrics. W&B does not need this second call, because
    :class:`~kedit_train.callbacks.hosts.transformers_host.TransformersHost` sends metrics, tables and files to W&B
    itself.

    Args:
        trainer: a ``transformers.Trainer``, or None if the trainer is unknown.
    """

    def __init__(self, trainer: Any | None = None) -> None:
        # A strong reference would create a reference cycle that keeps the trainer and its model in memory.
        self._handler = None if trainer is None else weakref.ref(trainer.callback_handler)

    def _callbacks(self) -> list[Any]:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, WandbCallback

        handler = None if self._handler is None else self._handler()
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        every = [] if handler is None else handler.callbacks
        return [one for one in every if isinstance(one, kinds) and not isinstance(one, WandbCallback)]

    def add_to_notebook_table(self, args: Any, state: Any, metrics: Mapping[str, float]) -> None:
        """Add a line with the scores of the edits to the table that a trainer displays in a notebook.

        The trainer itself writes only the loss into this table. If ``eval_strategy`` is set, this method adds nothing.
        The trainer then writes its own evaluations into the table, and they already contain the scores.

        Args:
            args: the arguments of the trainer.
            state: the state of the trainer.
            metrics: metrics by key. Only those in :data:`COLUMNS` are shown.
        """
        handler = None if self._handler is None else self._handler()
        scores = {name: round(metrics[key], 3) for key, name in COLUMNS.items() if key in metrics}
        if handler is None or not scores or args.eval_strategy != "no":
            return
        loss = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), "No log")
        for callback in handler.callbacks:
            tracker = getattr(callback, "training_tracker", None)
            if tracker is not None:
                tracker.write_line({"Step": state.global_step, "Training Loss": loss, **scores})

    def unreachable(self, report_to: str | list[str] | None) -> list[str]:
        """Return the names in ``report_to`` for which the trainer has no logger callback. W&B is left out."""
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        names = [report_to] if isinstance(report_to, str) else report_to or []
        present = self._callbacks()
        return [
            name
            for name in names
            if name not in ("wandb", "none")
            and not any(isinstance(one, INTEGRATION_TO_CALLBACK.get(name, ())) for one in present)
        ]

    def send(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Log metrics at the current step.

        Args:
            args: the arguments of the trainer.
            state: the state of the trainer.
            control: the control object of the trainer.
            metrics: metrics by key.
            last: whether training has ended. The metrics are then sent only to TensorBoard, which can open its log
                again. Most other loggers would begin a new run.
        """
        from transformers.integrations.integration_utils import TensorBoardCallback

        for callback in self._callbacks() if metrics else ():
            if not last or isinstance(callback, TensorBoardCallback):
                callback.on_log(args, state, control, logs=dict(metrics))
            if last and isinstance(callback, TensorBoardCallback):
                callback.on_train_end(args, state, control)
