"""Render the results of ``run_edits``, ``survey`` and ``tune`` as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedit_train.evaluation.reporting.html_elements import Cell, escape, figure, paragraph, table
from kedit_train.evaluation.reporting.svg_plots import COLORS, Point, curves, legend, scatter
from kedit_train.modes.retention_curve import PANELS

_GREY = "#808080"


def render_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 0) -> str:
    """Return a heading and a table. Columns after the first ``text_columns`` are right-aligned."""
    cells = [Cell(text=name, style="" if i < text_columns else "number") for i, name in enumerate(head)]
    return f"<h1>{escape(title)}</h1>" + table(cells, ([Cell(text=text) for text in row] for row in rows))


def render_mode_result(result: Any, notes: Sequence[str]) -> str:
    """Return a ``ModeResult`` as HTML: the retention curve, the table of its values, the notes, and the metadata.

    Args:
        result: the result.
        notes: sentences that explain the table.
    """
    scores: dict[str, dict[int, Any]] = {}
    for checkpoint in result.checkpoints:
        for name, score in checkpoint.scores().items():
            if name in PANELS:
                scores.setdefault(name, {})[checkpoint.edits] = score
    head, *rows = result.rows()
    plot = legend([(name, COLORS[i % len(COLORS)]) for i, name in enumerate(scores)]) + curves(scores, "edits")
    return "\n".join(
        [
            f"<h1>{escape(result.title)}</h1>",
            figure(plot, " ".join(f"{name}: {PANELS[name]}." for name in scores)) if scores else "",
            table(
                [Cell(text=name, style="number") for name in head],
                ([Cell(text=text) for text in row] for row in rows),
                cards=True,
            ),
            paragraph(" ".join(notes), "dim"),
            _metadata(result.meta),
        ]
    )


def render_tune_result(result: Any, columns: Sequence[str]) -> str:
    """Return a ``TuneResult`` as HTML: the plot of the trials, the table of the trials, the notes, and the metadata.

    Args:
        result: the result.
        columns: the names of the columns of ``result.rows()``.
    """
    head = [Cell(text=name, style="number") for name in columns[:-1]] + [Cell(text=columns[-1])]
    rows = result.rows()
    marked = ["strong" if row[-1] in ("picked", "held out") else "" for row in rows]
    names = [("on the Pareto front", COLORS[0]), ("other settings", _GREY), ("held out", COLORS[1])]
    caption = (
        "Each point is one setting, trained on one number of edits. A filled point has a reliability of at least 0.95. "
        "A ring marks the picked setting. Move the mouse over a point to read its setting."
    )
    return "\n".join(
        [
            f"<h1>{escape(result.title)}</h1>",
            figure(legend(names) + scatter(_points(result), "locality", "generality"), caption),
            table(head, ([Cell(text=text) for text in row] for row in rows), styles=marked, cards=True),
            *(paragraph(note, "dim") for note in result.notes()),
            _metadata(result.meta),
        ]
    )


def _points(result: Any) -> list[Point]:
    """Return the points in drawing order: trials outside the Pareto front, trials on it, and the held-out trial."""
    front, points = result.front, []
    for trial in (*sorted(result.trials, key=lambda trial: trial in front), result.held_out):
        if trial.error or (trial.generality is None and trial.locality is None):
            continue
        held_out = trial is result.held_out
        points.append(
            Point(
                # If a score could not be measured, the point is drawn at 1, so that the setting does not look worse
                # than the others.
                x=1.0 if trial.locality is None else trial.locality,
                y=1.0 if trial.generality is None else trial.generality,
                title=f"{'held out, ' if held_out else ''}{trial.edits} edits: {trial.setting}",
                color=COLORS[1] if held_out else COLORS[0] if trial in front else _GREY,
                filled=trial.reliable,
                ring=trial is result.picked,
            )
        )
    return points


def _metadata(meta: dict[str, Any]) -> str:
    rows = ([Cell(text=name, style="dim"), Cell(text=str(value), style="text")] for name, value in meta.items())
    return "<h2>How to reproduce it</h2>" + table([Cell(), Cell()], rows)
