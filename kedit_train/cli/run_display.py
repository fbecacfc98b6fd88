"""The messages of a running recipe: a summary before the first step, and one line of progress.

The messages are written to standard error, because standard output is for results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kedit_train.callbacks import EditCallback
from kedit_train.callbacks.hosts.lightning import key_figures
from kedit_train.cli.console import plain
from kedit_train.core.run import EditRun
from kedit_train.data.tokenization import shorten


def summary(run: EditRun) -> list[str]:
    """Return the lines that describe a run before its first step: edits, weights that may change, and callbacks."""
    scope, lines = run.describe_scope(), []
    if run.edits:
        name = getattr(run.edits, "name", None)
        lines.append(f"edits       {len(run.edits)}{f' ({name})' if name else ''}")
    tensors, share = scope["tensors"], scope["parameters"] / max(1, scope["of"])
    lines.append(f"may change  {scope['parameters']:,} of {scope['of']:,} parameters ({share:.1%})")
    more = "" if len(tensors) == 1 else f" and {len(tensors) - 1} more"
    lines.append(f"            {tensors[0]}{more}")
    callbacks = [shorten(repr(callback), 100) for callback in run.callbacks]
    lines += [f"{'' if i else 'callbacks':<12}{callback}" for i, callback in enumerate(callbacks)]
    return [plain(line) for line in lines]


def print_summary(callbacks: Iterable[Any]) -> None:
    """Print the :func:`summary` of a run, given the callbacks of its trainer."""
    run = next((c.run for c in callbacks if isinstance(c, EditCallback) and c.run is not None), None)
    if run is not None and run.host.is_main:
        print("\n".join(summary(run)), file=sys.stderr, flush=True)


class PrintSummary(Callback):
    """Print the edits, the weights that may change, and the callbacks at the start of a Lightning run.

    Put this callback before all other callbacks. The summary is then printed before the other callbacks begin to work.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        print_summary(trainer.callbacks)


class RunProgress(ProgressBar):
    """Show one line for the whole run: the step, and the last loss, reliability and locality.

    The line is shown only in a terminal. If the output goes to a file or a pipe, a new line is printed every few epochs
    instead. Put this callback before the callbacks that print results at the end of the run. The progress line is then
    complete before the results are printed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._progress, self._task = True, Progress(disable=True), TaskID(0)

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        steps = trainer.estimated_stepping_batches
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}" + ("" if steps == float("inf") else " of {task.total:.0f}")),
            BarColumn(bar_width=10),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            # Output of the callbacks must appear above the line and not inside of it.
            redirect_stdout=sys.stdout.isatty(),
            disable=not (self._enabled and sys.stderr.isatty()),
        )
        self._task = self._progress.add_task("", total=None if steps == float("inf") else steps, figures="")
        self._progress.start()

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        figures = " ".join(key_figures(trainer.callback_metrics))
        self._progress.update(self._task, completed=trainer.global_step, figures=figures)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._progress.stop()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._progress.stop()


def display_callbacks(callbacks: Iterable[Any], *, progress: bool) -> list[Callback]:
    """Return the callbacks that print the summary and the progress of a Lightning run.

    Put the returned callbacks before all other callbacks of the run.

    Args:
        callbacks: the callbacks of the run. If they contain a progress bar, :class:`RunProgress` is not added.
        progress: if False, the list is empty.
    """
    if not progress:
        return []
    has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return [PrintSummary(), *([] if has_bar else [RunProgress()])]
