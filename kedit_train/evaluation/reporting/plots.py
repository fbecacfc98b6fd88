"""Plots of reports: reliability against locality, and scores by token position.

matplotlib comes with the ``report`` extra. This module imports matplotlib only when it draws a plot, and does not use
matplotlib's global state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError
from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.optional import require
from kedit_train.plural import plural

# The colors of Okabe and Ito, which color-blind readers can tell apart, each with its own marker.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure.

    Args:
        width: width in inches.
        height: height in inches.

    Raises:
        EditError: matplotlib is not installed.
    """
    with require("matplotlib", extra="report"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a PNG file atomically, and create missing parent folders."""
    path = Path(path)
    if path.suffix != ".png":
        raise EditError(f"path must end in .png, got {str(path)!r}.")
    with writing(path) as unfinished:
        figure.savefig(unfinished, format="png")
    return path


def color_and_marker(number: int) -> tuple[str, str]:
    """Return the color and the marker of the ``number``-th curve."""
    return _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]


def draw_curve(axes: Any, scores: Mapping[int, Score], *, color: str, label: str, **style: Any) -> None:
    """Draw scores as a curve, and their confidence intervals as a band.

    Args:
        axes: the matplotlib axes.
        scores: dict from the position on the horizontal axis to the score.
        color: color of the curve and the band.
        label: label in the legend.
        style: additional arguments for ``axes.plot``.
    """
    positions = list(scores)
    axes.plot(positions, [s.value for s in scores.values()], color=color, label=label, **style)
    low = [s.value if s.low is None else s.low for s in scores.values()]
    high = [s.value if s.high is None else s.high for s in scores.values()]
    axes.fill_between(positions, low, high, color=color, alpha=0.15, linewidth=0)
    if len(positions) == 1:
        # A band over one position has no width.
        axes.vlines(positions, low, high, color=color, alpha=0.4, linewidth=3)


def reliability_locality(reports: Mapping[str, ReportData], path: str | os.PathLike[str]) -> Path:
    """Plot each report as a point: reliability on the x-axis, locality on the y-axis, with 95 % intervals.

    The best edit is in the upper right corner. If a report contains the scores of the unedited model, a cross shows
    the unedited model. Its locality is 1 if locality is the fraction of answers that equal the unedited model's
    answers. If locality is measured against the true answers (with the protocol "probability"), the cross shows the
    unedited model's own score.

    Args:
        reports: dict from label to report. All reports must be on the same edits.
        path: a ``.png`` file.

    Returns:
        The path.

    Raises:
        EditError: the reports are on different edits, the reports measure locality in different ways, or a report has
            no reliability or locality score.
    """
    _check_same_edits(reports)
    meanings = {report.metrics["locality"]["compared_with"] for report in reports.values()}
    if len(meanings) > 1:
        raise EditError(
            "reports must all measure locality in the same way, but some compare the answers with the unedited model's "
            "answers and some with the true answers; make all reports with the same protocol and with "
            "evaluate(..., unedited=...)."
        )
    figure = new_figure(6.0, 5.0)
    axes = figure.subplots()
    lowest = 1.0
    for number, (label, report) in enumerate(reports.items()):
        scores = {question: report.metrics[question]["generated"] for question in ("reliability", "locality")}
        empty = next((question for question, score in scores.items() if score.value is None), None)
        if empty is not None:
            raise EditError(
                f"report {label!r} has no {empty} probes, so it cannot be plotted; evaluate edits with {empty} probes."
            )
        x, y = scores.values()
        color, marker = color_and_marker(number)
        axes.errorbar(
            x.value,
            y.value,
            xerr=_error_bar(x),
            yerr=_error_bar(y),
            fmt=marker,
            color=color,
            label=label,
            capsize=3,
            markersize=8,
            zorder=3,
            clip_on=False,
        )
        lowest = min(lowest, y.value if y.low is None else y.low)
    first = next((report for report in reports.values() if report.unedited is not None), None)
    if first is not None and first.unedited is not None:
        x, y = (first.unedited[question]["generated"].value for question in ("reliability", "locality"))
        y = 1.0 if meanings == {"unedited model"} else y
        lowest = min(lowest, y)
        axes.plot(x, y, "x", color="grey", markersize=9, markeredgewidth=2, label="unedited", clip_on=False)
    locality = "unchanged answers" if meanings == {"unedited model"} else "right answers"
    axes.set_xlabel("reliability: fraction of edits with the new answer")
    axes.set_ylabel(f"locality: fraction of {locality} to other prompts")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(max(0.0, lowest - 0.05) - 0.01, 1.01)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="best")
    axes.set_title(f"{_edits(first or next(iter(reports.values())))}; bars: 95 % intervals over edits", fontsize=10)
    return save_figure(figure, path)


def positions(reports: Mapping[str, ReportData], path: str | os.PathLike[str]) -> Path:
    """Plot token accuracy and token probability against the token's position in the edits' targets.

    Token accuracy is the fraction of tokens that the model ranks first. Both scores are teacher-forced. A curve that
    falls or rises along the target shows heterogeneous token overfitting ("Mitigating Heterogeneous Token Overfitting
    in LLM Knowledge Editing", arXiv 2502.00602). Bands are 95 % intervals over edits. The ``n`` below each position is
    the number of targets that have a token at this position.

    Args:
        reports: dict from label to report. All reports must be on the same edits.
        path: a ``.png`` file.

    Returns:
        The path.

    Raises:
        EditError: the reports differ in their edits, or no report has scores by token position.
    """
    _check_same_edits(reports)
    figure = new_figure(8.5, 4.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    curves = {label: report.metrics.get("positions", {}) for label, report in reports.items()}
    longest = max(curves.values(), key=len)
    if not longest:
        raise EditError("no report has scores by token position; evaluate edits that have targets.")
    unedited = next((r.unedited.get("positions", {}) for r in reports.values() if r.unedited is not None), {})
    titles = {"accuracy": "fraction ranked first", "probability": "mean probability"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        if unedited:
            scores = _by_position(unedited, name)
            draw_curve(axes, scores, color="grey", label="unedited", linestyle="--", marker="x", markersize=5)
        for number, (label, by_position) in enumerate(curves.items()):
            color, marker = color_and_marker(number)
            draw_curve(axes, _by_position(by_position, name), color=color, label=label, marker=marker, markersize=5)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_ylim(-0.03, 1.03)
        axes.tick_params(labelsize=8)
    ticks = [int(position) for position in longest]
    step = -(-len(ticks) // 10)
    counts = [f"{position}\nn={longest[str(position)]['accuracy'].n}" for position in ticks[::step]]
    panels[0].set_xticks(ticks[::step], counts)
    panels[0].legend(frameon=False, loc="best")
    figure.supxlabel("token position in the target", fontsize=10)
    edits = _edits(next(iter(reports.values())))
    figure.suptitle(f"{edits}; teacher-forced; bands: 95 % intervals over edits", fontsize=10)
    return save_figure(figure, path)


def _by_position(scores: Mapping[str, Any], name: str) -> dict[int, Score]:
    return {int(position): own[name] for position, own in scores.items()}


def _error_bar(score: Score) -> list[list[float]] | None:
    if score.value is None or score.low is None or score.high is None:
        return None
    # Rounding can put a bootstrap bound on the wrong side of the value.
    return [[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]]


def _check_same_edits(reports: Mapping[str, ReportData]) -> None:
    if not reports:
        raise EditError("reports is empty; give at least one report.")
    if len({(report.meta["data_hash"], report.meta["n_edits"]) for report in reports.values()}) > 1:
        raise EditError(
            "the reports are on different edits; evaluate all models on the same file of edits, with the same limit."
        )


def _edits(report: ReportData) -> str:
    n = report.meta["n_edits"]
    return f"{plural(n, 'edit')} ({report.meta['data_name']})"
