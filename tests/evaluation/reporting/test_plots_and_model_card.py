"""Plots and the model card section show the numbers of the report."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kedit_train.callbacks
from kedit_train.data import Edit, Probe
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, Report, evaluate
from kedit_train.evaluation.reporting import model_card as card
from kedit_train.evaluation.reporting import plots

EDITS = [
    Edit("Ann lives in", "Köln", rephrases=("Ann's town:",), locality={"near": (Probe("Bob lives in", ("Oslo",)),)}),
    Edit("Cyd lives in", "Lima", rephrases=("Cyd's town:",), locality={"near": (Probe("Dan lives in", ("Nice",)),)}),
]
OLD = {"Bob lives in": " Oslo", "Dan lives in": " Nice"}


@pytest.fixture
def reports(scripted_model: Any) -> dict[str, Report]:
    """Two reports: one edit learned with full locality, and both learned with one changed answer to another prompt."""
    before = evaluate(*scripted_model(OLD), EDITS, progress=False)
    careful = OLD | {"Ann lives in": " Köln"}
    greedy = careful | {"Cyd lives in": " Lima", "Bob lives in": " Köln"}
    return {
        "careful": evaluate(*scripted_model(careful), EDITS, unedited=before, progress=False),
        "greedy": evaluate(*scripted_model(greedy), EDITS, unedited=before, progress=False),
    }


@pytest.fixture
def last_figure(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return the figure that was saved last."""
    kept: list[Any] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda drawing, path: kept.append(drawing) or save(drawing, path))
    return lambda: kept[-1]


def test_the_plot_of_two_scores_shows_them(reports: dict[str, Report], last_figure: Any, tmp_path: Path) -> None:
    path = plots.reliability_locality(reports, tmp_path / "new" / "plane.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["plane.png"]
    (axes,) = last_figure().axes
    points = {bars.get_label(): bars[0].get_xydata().tolist() for bars in axes.containers}
    assert points == {"careful": [[0.5, 1.0]], "greedy": [[1.0, 0.5]]}
    (unedited,) = [line for line in axes.lines if line.get_label() == "unedited"]
    assert unedited.get_xydata().tolist() == [[0.0, 1.0]]
    score = reports["greedy"].metrics["locality"]["generated"]
    (whisker,) = axes.containers[1][2][1].get_segments()
    assert whisker.tolist() == [[1.0, score.low], [1.0, score.high]]
    low, high = axes.get_ylim()
    assert low <= score.low <= 1.0 <= high


def test_against_the_true_answers_the_cross_shows_the_score_of_the_unedited_model(
    scripted_model: Any, last_figure: Any, tmp_path: Path
) -> None:
    # "probability" compares with the true answers, of which the unedited model knows only one.
    options = EvaluationOptions(protocol="probability")
    wrong = {"Bob lives in": " Oslo", "Dan lives in": " Rome", "Cyd lives in": " Lima"}
    edits = [replace(edit, old_target="Rome") for edit in EDITS]
    before = evaluate(*scripted_model(wrong), edits, options=options, progress=False)
    report = evaluate(*scripted_model(OLD), edits, options=options, unedited=before, progress=False)
    plots.reliability_locality({"edited": report}, tmp_path / "plane.png")
    (axes,) = last_figure().axes
    (unedited,) = [line for line in axes.lines if line.get_label() == "unedited"]
    expected = [before.metrics[question]["generated"].value for question in ("reliability", "locality")]
    assert expected[1] < 1.0
    assert unedited.get_xydata().tolist() == [expected]


def test_the_position_plot_shows_every_position(reports: dict[str, Report], last_figure: Any, tmp_path: Path) -> None:
    plots.positions(reports, tmp_path / "positions.png")
    for axes, name in zip(last_figure().axes, ("accuracy", "probability"), strict=True):
        curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        wanted = {label: report.metrics["positions"] for label, report in reports.items()}
        wanted["unedited"] = reports["greedy"].unedited["positions"]  # type: ignore[index]
        assert curves == {
            label: [[float(place), own[name].value] for place, own in places.items()]
            for label, places in wanted.items()
        }
        assert len(curves["greedy"]) == len(b" K\xc3\xb6ln")
    assert [tick.get_text() for tick in last_figure().axes[0].get_xticklabels()][:2] == ["1\nn=2", "2\nn=2"]
    assert last_figure().axes[0].get_xticklabels()[-1].get_text() == "6\nn=1"


def test_reports_that_cannot_be_plotted_are_refused(
    reports: dict[str, Report], scripted_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = evaluate(*scripted_model(OLD), EDITS, progress=False)
    bare = evaluate(*scripted_model(OLD), [Edit("Ann lives in", "Köln")], progress=False)
    for wrong_reports, message in (
        ({}, "reports is empty"),
        (reports | {"alone": alone}, "some with the true answers"),
        (reports | {"bare": bare}, "different edits"),
        ({"bare": bare}, "report 'bare' has no locality probes"),
    ):
        with pytest.raises(EditError, match=message):
            plots.reliability_locality(wrong_reports, tmp_path / "plane.png")
    with pytest.raises(EditError, match=r"path must end in \.png"):
        plots.positions(reports, tmp_path / "plane.jpg")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EditError, match=r"kedit-train\[report\]"):
        plots.positions(reports, tmp_path / "positions.png")


def test_the_model_card_section_shows_the_report(reports: dict[str, Report]) -> None:
    report = reports["greedy"]
    used = ['TokenLoss("overtone", label_weight=0.1)', "NormBall(radius=0.1)", "MyOwn(x=1)"]
    report = replace(report, meta={**report.meta, "callbacks": used, "steps": 12})
    text = card.model_card_section(report, cost={"training": "3 s on one | core"}, base="me/model_x")
    score = report.metrics["locality"]["generated"]
    assert f"| locality: unchanged | – | 0.500 | {score.low:.2f}–{score.high:.2f} | 2 |" in text
    assert "| reliability | 0.000 | 1.000 | 1.00–1.00 | 2 |" in text
    assert "| portability | – | no probes | – | 0 |" in text
    assert "| Ann lives in | (empty) | Köln | Köln |" in text
    for part in (report.meta["data_hash"], "base model: me/model\\_x", "optimizer steps: 12", "3 s on one \\| core"):
        assert part in text
    assert set(re.findall(r"arXiv (\d+\.\d+)\]", text)) == {"2502.00602", "2012.00363", card.EVALUATION_PAPER[1]}
    assert card.questions_without_probes(report) == ["portability"]


def test_the_papers_are_cited_in_the_docstrings_of_the_callbacks() -> None:
    for name, papers in card.PAPERS.items():
        doc = getattr(kedit_train.callbacks, name.split("(")[0]).__doc__
        assert papers
        assert all(number in doc for _, number in papers), name


def test_a_section_is_inserted_into_a_model_card_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "README.md"
    card.insert_section(path, "first\n")
    assert path.read_text() == f"{card.BEGIN}\nfirst\n{card.END}\n"
    path.write_bytes(b"# Mine\r\n" + path.read_bytes() + b"tail")
    card.insert_section(path, "second")
    assert path.read_bytes() == f"# Mine\r\n{card.BEGIN}\nsecond\n{card.END}\ntail".encode()
    assert [file.name for file in path.parent.iterdir()] == ["README.md"]
    path.write_text(f"{card.END} {card.BEGIN}")
    with pytest.raises(EditError, match="once each"):
        card.insert_section(path, "third")
    path.write_text(card.BEGIN)
    with pytest.raises(EditError, match="correct the comments, or remove all of them"):
        card.insert_section(path, "third")
    assert path.read_text() == card.BEGIN
