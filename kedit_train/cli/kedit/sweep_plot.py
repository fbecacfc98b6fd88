"""The plot of a sweep: reliability and locality for each multiple of a delta."""

from __future__ import annotations

import os
from pathlib import Path

from kedit_train.delta import Sweep
from kedit_train.evaluation.reporting.plots import new_figure, save_figure


def sweep_plot(sweep: Sweep, path: str | os.PathLike[str], *, forget: bool = False) -> Path:
    """Plot the reliability and the locality of each multiple of a delta, and mark the picked multiple.

    Args:
        sweep: the result of :func:`~kedit_train.delta.sweep`.
        path: the PNG file to write.
        forget: True if the model should forget the targets of the edits. The curve of the reliability is then named
            "forgotten", and shows the fraction of edits for which the model no longer gives the target.

    Raises:
        EditError: matplotlib is not installed, or the path does not end with ``.png``.
    """
    drawing = new_figure(6.0, 3.8)
    axes = drawing.subplots()
    coefficients = [point.coefficient for point in sweep.points]
    name = "forgotten" if forget else "reliability"
    for values, label, color, marker in (
        ([p.reliability for p in sweep.points], name, "#0072B2", "o"),
        ([p.locality for p in sweep.points], "locality", "#D55E00", "s"),
    ):
        axes.plot(coefficients, values, marker=marker, color=color, label=label, clip_on=False, zorder=3)
    axes.axvline(
        sweep.best.coefficient, color="black", linestyle="--", linewidth=1, label=f"picked: {sweep.best.coefficient:g}"
    )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(f"coefficient of the delta (0: the base model)\n{sweep.rule}", fontsize=9)
    axes.set_ylabel("fraction of questions")
    axes.grid(alpha=0.3)
    # The legend is above the axes, where it covers no curve.
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return save_figure(drawing, path)
