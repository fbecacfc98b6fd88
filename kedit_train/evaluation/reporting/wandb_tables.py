"""A report as tables and charts for the loggers of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kedit_train.evaluation.report import Report
from kedit_train.evaluation.scoring.normalize import normalise
from kedit_train.optional import require

# In words and not by a colour: loggers show cells as text, and sort and filter by it.
CHANGED, SAME = "changed", ""
POSITIONS = ("model", "token", "accuracy", "loss", "probability", "n")

Table = tuple[list[str], list[list[Any]]]


def answers(report: Report) -> Table:
    """The edits: prompt, target, old_target, before, after, right, and whether the answer has changed."""
    rows = report.answers_table()
    columns = ["prompt", "target", "old_target", "before", "after", "right"]
    return [*columns, "changed"], [[*(row[c] for c in columns), _mark(row["before"], row["after"])] for row in rows]


def elsewhere(report: Report) -> Table:
    """The answers that were to stay and did not: kind, prompt, before, after, and whether it was and is right."""
    columns = ["kind", "prompt", "before", "after", "right_before", "right"]
    found = [r for r in report.answers if r.question == "locality" and r.unchanged is False]
    return columns, [[r.kind, r.prompt, r.before, r.answer, r.right_before, r.right] for r in found]


def positions(model: str, report: Report) -> Iterator[list[Any]]:
    """Rows of :data:`POSITIONS`: how the edits' targets stand, token by token."""
    for token, scores in report.metrics["positions"].items():
        figures = [scores[name].value for name in ("accuracy", "loss", "probability")]
        yield [model, int(token), *figures, scores["accuracy"].n]


def curves_to_wandb(run: Any, rows: Sequence[Sequence[Any]]) -> None:
    """One line a model over the targets' tokens, of probability and of loss, from rows of :data:`POSITIONS`."""
    with require("wandb", extra="wandb"):
        import wandb

    for name in ("probability", "loss"):
        table = wandb.Table(columns=list(POSITIONS), data=[list(row) for row in rows])
        title = f"{name} of the target's tokens"
        run.log({f"edit/positions_{name}": wandb.plot.line(table, "token", name, stroke="model", title=title)})


def keep_report(host: Any, report: Report) -> None:
    """The report, JSON and Markdown, with the run of the host's logger, whether it was saved elsewhere or not."""
    if host.wandb_run() is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in (("report.json", "report"), ("report.md", "report-markdown")):
            host.log_file(report.save(Path(folder) / name), kind)


def _mark(before: str | None, after: str) -> str:
    return CHANGED if before is not None and normalise(before) != normalise(after) else SAME
