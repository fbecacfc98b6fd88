"""A sweep as a picture: what each multiple of a delta brings, and what it costs."""

from __future__ import annotations

import os
from pathlib import Path

from kedit_train.delta import Sweep
from kedit_train.evaluation.reporting.plots import figure, saved


def sweep_plot(found: Sweep, path: str | os.PathLike[str], *, forget: bool = False) -> Path:
    """Draw reliability and locality over the coefficient, with the picked one marked and the rule below.

    Args:
        path: a ``.png``.
        forget: reliability stands for what is no longer answered.

    Raises:
        EditError: matplotlib is missing, or another ending.
    """
    drawing = figure(6.0, 3.8)
    axes = drawing.subplots()
    at = [point.coefficient for point in found.points]
    name = "forgotten" if forget else "reliability"
    for values, label, colour, marker in (
        ([p.reliability for p in found.points], name, "#0072B2", "o"),
        ([p.locality for p in found.points], "locality", "#D55E00", "s"),
    ):
        axes.plot(at, values, marker=marker, color=colour, label=label, clip_on=False, zorder=3)
    axes.axvline(
        found.best.coefficient, color="black", linestyle="--", linewidth=1, label=f"picked: {found.best.coefficient:g}"
    )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(f"coefficient of the delta (0: the base)\n{found.rule}", fontsize=9)
    axes.set_ylabel("share of the questions")
    axes.grid(alpha=0.3)
    # Above the axes, where no curve runs.
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return saved(drawing, path)
