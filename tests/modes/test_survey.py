"""The six metrics of the survey, on a model that learns and forgets by a rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from modes.teacher import N, Teacher, facts

from kedit_train import run_edits, survey
from kedit_train.data import Edit
from kedit_train.errors import EditError
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE
from kedit_train.modes import retainability


def test_the_six_metrics_of_the_survey(learner: Any, tmp_path: Path) -> None:
    class Crowded(Teacher):
        """Learns only every third of several edits."""

        def __call__(self, model: Any, edits: Sequence[Edit]) -> None:
            super().__call__(model, edits if len(edits) == 1 else edits[::3])

    runs = {
        mode: run_edits(*learner(), facts(), mode=mode, train=Crowded(2), checkpoints=(1,), progress=False)
        for mode in ("single", "batch", "sequential")
    }
    found = survey(runs["batch"], runs["single"], runs["sequential"])
    assert found.scalability.value == pytest.approx(1 - 4 / 12)
    assert found.scalability.n == N
    low, high = found.scalability.low, found.scalability.high
    assert low is not None
    assert high is not None
    assert 0.3 < low < 2 / 3 < high <= 1.0
    assert found.accuracy.value == pytest.approx(4 / 12)
    assert found.generality.value == pytest.approx(2 / 12)  # edits 0 and 6
    assert found.locality.value == pytest.approx(11 / 12)  # the neighbor of 0 changed
    assert found.retainability.value == pytest.approx((2 / 12 - 1) / 11)
    assert survey(runs["single"]).accuracy.value == 1.0
    table = found.markdown()
    assert "| accuracy | batch | 0.333 | 0.08–0.58 | 12 |" in table
    assert "| retainability | sequential | -0.076 | – | 12 |" in table
    assert "| portability | batch | – | – | 0 |" in table
    assert json.loads(json.dumps(found.to_dict()))["scalability"]["n"] == N
    page = found.save(tmp_path / "survey.html").read_text(encoding="utf-8")
    assert found._repr_html_() in page
    for row in found.rows():
        assert all(f">{cell}</td>" in page for cell in row)
    assert repr(found).startswith(
        "SurveyMetrics(accuracy 0.333, locality 0.917, generality 0.167, retainability -0.076"
    )


def test_survey_refuses_results_that_cannot_be_compared(learner: Any) -> None:
    one = run_edits(*learner(), facts(), mode="batch", train=Teacher(), progress=False)
    with pytest.raises(EditError, match="at most one result per mode"):
        survey(one, one)
    other = run_edits(*learner(), facts()[:5], mode="single", train=Teacher(), progress=False)
    with pytest.raises(EditError, match="differ in data_hash"):
        survey(one, other)
    with pytest.raises(EditError, match="at least one result"):
        survey()
    with pytest.raises(EditError, match="accuracy must have at least two entries"):
        retainability({5: 0.5})
    assert survey(one).retainability == NO_SCORE
