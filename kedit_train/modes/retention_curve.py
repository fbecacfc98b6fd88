"""The retention curve: scores on all edits so far, plotted over the number of edits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kedit_train.errors import EditError
from kedit_train.evaluation.reporting.plots import color_and_marker, draw_curve, new_figure, save_figure
from kedit_train.evaluation.scoring.bootstrap import Score

# Number of edits -> score name -> score.
RetentionScores = Mapping[int, Mapping[str, Score]]

PANELS = {
    "reliability": "edits so far with the new answer",
    "generality": "rephrasings with the new answer",
    "locality": "unchanged answers to other prompts",
    "agreement": "unchanged answers to unrelated prompts",
}


def draw_retention_curve(curves: Mapping[str, RetentionScores], path: str | os.PathLike[str]) -> Path:
    """Plot scores over the number of edits, one panel per score, one curve per label.

    Bands show 95 % confidence intervals over edits. If a curve has a single checkpoint, a bar shows the interval.
    Hollow markers in the first panel show the reliability on the newest edits only.

    Args:
        curves: nested dicts. ``curves[label][number of edits][score name]`` is a score.
        path: a ``.png`` file.

    Returns:
        The path.

    Raises:
        EditError: there are no scores, or matplotlib is not installed.
    """
    panels = [name for name in PANELS if any(name in scores for curve in curves.values() for scores in curve.values())]
    if not panels:
        raise EditError("results must contain at least one result with scores, got none; pass a result of run_edits.")
    figure = new_figure(3.4 * len(panels) + 0.4, 3.9)
    row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(row, panels, strict=True):
        for number, (label, curve) in enumerate(curves.items()):
            counts = [count for count in sorted(curve) if name in curve[count]]
            if not counts:
                # An empty curve that is not clipped has no extent, and matplotlib's layout fails on such a curve.
                continue
            color, marker = color_and_marker(number)
            scores = {count: curve[count][name] for count in counts}
            draw_curve(axes, scores, color=color, label=label, marker=marker, clip_on=False, zorder=3)
            if name == "reliability":
                latest = [curve[count]["latest"].value for count in counts]
                axes.plot(counts, latest, marker, color=color, fillstyle="none", markersize=9, clip_on=False)
        all_counts = sorted({count for curve in curves.values() for count in curve})
        axes.set_xscale("log")
        axes.set_xticks(all_counts, [f"{count:,}" for count in all_counts])
        axes.minorticks_off()
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.set_title(f"{name}\n{PANELS[name]}", fontsize=9)
    row[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.supxlabel("number of edits (hollow markers: only the newest edits)", fontsize=10)
    return save_figure(figure, path)
