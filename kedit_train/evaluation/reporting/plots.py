"""Reports as pictures: what an edit bought and what it cost, and where in the target a token did not take.

matplotlib is the ``report`` extra, imported when something is drawn, and used without its global state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.optional import require

# Okabe and Ito's colours, which stay apart for the colour-blind, each with a marker of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def figure(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        EditError: matplotlib is missing.
    """
    with require("matplotlib", extra="report"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def saved(drawing: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, whole or not at all; parent folders are made."""
    path = Path(path)
    if path.suffix != ".png":
        raise EditError(f"{path}: pictures are written as PNG; end the name in .png")
    with writing(path) as unfinished:
        drawing.savefig(unfinished, format="png")
    return path


def reliability_locality(reports: Mapping[str, Report], path: str | os.PathLike[str]) -> Path:
    """Draw reports as points: reliability to the right, locality upwards, each with its 95 % interval.

    The best an edit can do is the upper right corner. Where the reports know the unedited model, it is a cross: its
    locality is 1 by definition where locality means "the same answer as before".

    Args:
        reports: label -> report, all on the same edits.
        path: a ``.png``.

    Raises:
        EditError: other edits or another meaning of locality in one of them, a report without probes of either kind.
    """
    _same_edits(reports)
    meanings = {report.metrics["locality"]["compared_with"] for report in reports.values()}
    if len(meanings) > 1:
        raise EditError(
            "some of these reports compare locality with the unedited model and some with the truth, which are no one "
            "axis: evaluate all of them against the unedited model"
        )
    drawing = figure(6.0, 5.0)
    axes = drawing.subplots()
    lowest = 1.0
    for at, (label, report) in enumerate(reports.items()):
        place = [report.metrics[question]["generated"] for question in ("reliability", "locality")]
        empty = next((q for q, s in zip(("reliability", "locality"), place, strict=True) if s.value is None), None)
        if empty is not None:
            raise EditError(f"{label} has no probes of {empty}, so it has no place in this picture: use other edits")
        x, y = place
        colour, marker = _COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)]
        axes.errorbar(x.value, y.value, xerr=_whiskers(x), yerr=_whiskers(y), fmt=marker, color=colour, label=label,
                      capsize=3, markersize=8, zorder=3, clip_on=False)  # fmt: skip
        lowest = min(lowest, y.value if y.low is None else y.low)
    first = next((report for report in reports.values() if report.unedited is not None), None)
    if first is not None and first.unedited is not None:
        was = first.unedited["reliability"]["generated"].value
        axes.plot(was, 1.0, "x", color="grey", markersize=9, markeredgewidth=2, label="unedited", clip_on=False)
    what = "same answers as before" if meanings == {"unedited model"} else "right answers"
    axes.set_xlabel("reliability: edits answered as wanted")
    axes.set_ylabel(f"locality: {what} elsewhere")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(max(0.0, lowest - 0.05) - 0.01, 1.01)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="best")
    axes.set_title(f"{_edits(first or next(iter(reports.values())))}; bars: 95 % over edits", fontsize=10)
    return saved(drawing, path)


def positions(reports: Mapping[str, Report], path: str | os.PathLike[str]) -> Path:
    """Draw, by the token's place in the edits' targets, how often it is first choice, and its probability.

    Teacher-forced. A curve that falls or rises along the target is heterogeneous token overfitting ("Mitigating
    Heterogeneous Token Overfitting in LLM Knowledge Editing", arXiv 2502.00602). Bands: 95 % over edits. Below
    each place stands how many targets are that long: few of them reach the last ones.

    Args:
        reports: label -> report, all on the same edits.
        path: a ``.png``.

    Raises:
        EditError: other edits in one of them, or no report has positions.
    """
    _same_edits(reports)
    drawing = figure(8.5, 4.2)
    panels = drawing.subplots(1, 2, sharex=True, sharey=True)
    curves = {label: report.metrics.get("positions", {}) for label, report in reports.items()}
    longest = max(curves.values(), key=len)
    if not longest:
        raise EditError("none of these reports has scores by token: the edits have no targets to score; evaluate again")
    unedited = next((r.unedited.get("positions", {}) for r in reports.values() if r.unedited is not None), {})
    for axes, name, title in zip(
        panels, ("accuracy", "probability"), ("first choice", "mean probability"), strict=True
    ):
        if unedited:
            _curve(axes, unedited, name, "unedited", "grey", "x", "--")
        for at, (label, places) in enumerate(curves.items()):
            _curve(axes, places, name, label, _COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)], "-")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_ylim(-0.03, 1.03)
        axes.tick_params(labelsize=8)
    ticks = [int(place) for place in longest]
    step = -(-len(ticks) // 10)
    counts = [f"{place}\nn={longest[str(place)]['accuracy'].n}" for place in ticks[::step]]
    panels[0].set_xticks(ticks[::step], counts)
    panels[0].legend(frameon=False, loc="best")
    drawing.supxlabel("token of the target", fontsize=10)
    drawing.suptitle(f"{_edits(next(iter(reports.values())))}; teacher-forced, bands: 95 % over edits", fontsize=10)
    return saved(drawing, path)


def _curve(axes: Any, places: Mapping[str, Any], name: str, label: str, colour: str, marker: str, line: str) -> None:
    at = [int(place) for place in places]
    scores: Sequence[Score] = [place[name] for place in places.values()]
    axes.plot(at, [s.value for s in scores], line, marker=marker, color=colour, label=label, markersize=5)
    low, high = ([s.value if bound is None else bound for s, bound in zip(scores, bounds, strict=True)]
                 for bounds in ([s.low for s in scores], [s.high for s in scores]))  # fmt: skip
    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _whiskers(score: Score) -> list[list[float]] | None:
    if score.value is None or score.low is None or score.high is None:
        return None
    # A bootstrap quantile can lie beyond the value by the last bits.
    return [[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]]


def _same_edits(reports: Mapping[str, Report]) -> None:
    if not reports:
        raise EditError("no reports to draw: give at least one")
    if len({(report.meta["data_hash"], report.meta["n_edits"]) for report in reports.values()}) > 1:
        raise EditError("these reports are on different edits, so their scores do not compare: evaluate on one file")


def _edits(report: Report) -> str:
    n = report.meta["n_edits"]
    return f"{n} edit{'s' * (n != 1)} ({report.meta['data_name']})"
