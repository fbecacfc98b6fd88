"""The plot of the retention curve."""

from __future__ import annotations

import pytest

from kedit_train.errors import EditError
from kedit_train.evaluation import Score
from kedit_train.modes import retention_curve
from kedit_train.modes.retention_curve import draw_retention_curve


def scores(reliability: float) -> dict[str, Score]:
    return {"reliability": Score(reliability, n=4, low=0.1, high=1.0), "latest": Score(1.0, n=1)}


def test_curves_of_different_length_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    curves = {"one at a time": {1: scores(1.0), 10: scores(0.5)}, "at once": {10: scores(0.9)}}
    path = draw_retention_curve(curves, tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_scores_are_refused(tmp_path):
    with pytest.raises(EditError, match="at least one result"):
        retention_curve({}, tmp_path / "curve.png")
