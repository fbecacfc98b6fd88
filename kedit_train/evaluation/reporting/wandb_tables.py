"""Convert a report into tables and charts for experiment loggers such as W&B."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kedit_train.core.callback_arguments import callback_arguments
from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.scoring.normalize import normalize
from kedit_train.optional import require

# Changes are marked with words and not with colors, because loggers sort and filter cells by their text.
CHANGED, SAME = "changed", ""
POSITION_COLUMNS = ("model", "token", "accuracy", "loss", "probability", "n")

Table = tuple[list[str], list[list[Any]]]


class Saveable(Protocol):
    """A report that can be saved to a file and converted to an HTML page."""

    def save(self, path: Path) -> Path: ...

    def html(self) -> str: ...


def answers_table(report: ReportData) -> Table:
    """Return a table of the edits, with the columns prompt, target, old_target, before, after, right and changed."""
    rows = report.answers_table()
    columns = ["prompt", "target", "old_target", "before", "after", "right"]
    return [*columns, "changed"], [[*(row[c] for c in columns), _mark(row["before"], row["after"])] for row in rows]


def changed_answers_table(report: ReportData) -> Table:
    """Return a table of changed locality answers: columns kind, prompt, before, after, right_before and right."""
    columns = ["kind", "prompt", "before", "after", "right_before", "right"]
    changed = [r for r in report.answers if r.question == "locality" and r.unchanged is False]
    return columns, [[r.kind, r.prompt, r.before, r.answer, r.right_before, r.right] for r in changed]


def position_rows(model: str, report: ReportData) -> Iterator[list[Any]]:
    """Yield one row of scores per token position in the edits' targets, with the columns :data:`POSITION_COLUMNS`.

    Args:
        model: the label of the model, for the first column.
        report: the report on this model.
    """
    for token, scores in report.metrics["positions"].items():
        values = [scores[name].value for name in ("accuracy", "loss", "probability")]
        yield [model, int(token), *values, scores["accuracy"].n]


def log_position_curves(run: Any, rows: Sequence[Sequence[Any]]) -> None:
    """Log two W&B charts, probability and loss by token position, with one line per model.

    Args:
        run: the W&B run.
        rows: the rows that :func:`position_rows` yields.
    """
    with require("wandb", extra="wandb"):
        import wandb

    for name in ("probability", "loss"):
        table = wandb.Table(columns=list(POSITION_COLUMNS), data=[list(row) for row in rows])
        title = f"{name} of the target's tokens"
        run.log({f"edit/positions_{name}": wandb.plot.line(table, "token", name, stroke="model", title=title)})


def log_report(host: Any, report: Saveable) -> None:
    """Log a report to the W&B run of the training. Without a W&B run, do nothing.

    The JSON, Markdown and HTML files of the report are uploaded as artifacts. The HTML page is also shown in the run,
    under the key ``edit/report``.
    """
    run = host.wandb_run()
    if run is None:
        return
    with require("wandb", extra="wandb"):
        import wandb

    names = {"report.json": "report", "report.md": "report-markdown", "report.html": "report-page"}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in names.items():
            host.log_file(report.save(Path(folder) / name), kind)
    run.log({"edit/report": wandb.Html(report.html(), inject=False)})


def log_configuration(run: Any, meta: Mapping[str, Any]) -> None:
    """Write the data, the model and the callbacks of an edit into the configuration of its W&B run, under ``edit``.

    Without a W&B run, do nothing.

    Args:
        run: the :class:`~kedit_train.core.run.EditRun`.
        meta: the metadata of a report on the edits.
    """
    wandb_run = run.host.wandb_run()
    if wandb_run is None:
        return
    settings = {name: meta[name] for name in ("data_name", "data_hash", "n_edits", "model", "settings", "versions")}
    settings |= {"scope": run.describe_scope(), "callbacks": [repr(callback) for callback in run.callbacks]}
    settings |= {"arguments": callback_arguments(run.callbacks)}
    wandb_run.config.update({"edit": settings}, allow_val_change=True)


def _mark(before: str | None, after: str) -> str:
    return CHANGED if before is not None and normalize(before) != normalize(after) else SAME
