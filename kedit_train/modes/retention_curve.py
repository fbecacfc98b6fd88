"""The retention curve: what a model still knows of all its edits as they become more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kedit_train.errors import EditError
from kedit_train.evaluation.reporting.plots import figure, saved
from kedit_train.modes.result import ModeResult

PANELS = {
    "reliability": "edits so far, answered as wanted",
    "generality": "their rephrasings, answered as wanted",
    "locality": "answers elsewhere, the same as before",
    "agreement": "unrelated prompts, continued as before",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def retention_curve(results: Mapping[str, ModeResult], path: str | os.PathLike[str]) -> Path:
    """Draw results over the number of edits: reliability, generality, locality, and agreement where it was measured.

    Bands, or bars where there is one checkpoint: 95 % over edits. Hollow markers in the first panel: the edits of the
    last round alone.

    Args:
        results: label -> result; a result with one checkpoint is one marker.
        path: a ``.png``.

    Raises:
        EditError: no results, or matplotlib is missing.
    """
    return drawn({label: _points(result) for label, result in results.items()}, path)


def _points(result: ModeResult) -> dict[int, dict]:
    return {checkpoint.edits: checkpoint.scores() for checkpoint in result.checkpoints}


def drawn(curves: Mapping[str, Mapping[int, Mapping]], path: str | os.PathLike[str]) -> Path:
    """The picture of label -> number of edits -> name -> :class:`Score`."""
    panels = [name for name in PANELS if any(name in at for points in curves.values() for at in points.values())]
    if not panels:
        raise EditError("there are no results to draw: give at least one with its scores")
    drawing = figure(3.4 * len(panels) + 0.4, 3.9)
    row = drawing.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(row, panels, strict=True):
        for number, (label, points) in enumerate(curves.items()):
            colour, marker = f"C{number}", MARKERS[number % len(MARKERS)]
            at = [count for count in sorted(points) if name in points[count]]
            if not at:
                # An empty line that is not clipped has no extent, and the layout fails on it.
                continue
            scores = [points[count][name] for count in at]
            axes.plot(at, [s.value for s in scores], marker=marker, color=colour, label=label, clip_on=False, zorder=3)
            low, high = (
                [s.value if bound is None else bound for s, bound in zip(scores, bounds, strict=True)]
                for bounds in ([s.low for s in scores], [s.high for s in scores])
            )
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            if len(at) == 1:
                # A band over one place has no width.
                axes.vlines(at, low, high, color=colour, alpha=0.4, linewidth=3)
            if name == "reliability":
                latest = [points[count]["latest"].value for count in at]
                axes.plot(at, latest, marker, color=colour, fillstyle="none", markersize=9, clip_on=False)
        counts = sorted({count for points in curves.values() for count in points})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.set_title(f"{name}\n{PANELS[name]}", fontsize=9)
    row[0].legend(frameon=False, fontsize=8, loc="lower left")
    drawing.supxlabel("edits; hollow markers: those of the last round alone", fontsize=10)
    return saved(drawing, path)
