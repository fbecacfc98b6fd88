"""The view of a W&B project shows the series, the tables and the report of a run."""

from __future__ import annotations

import re
import sys

import pytest

from kedit_train.errors import EditError
from kedit_train.evaluation.reporting.wandb_workspace import REPORT, SCORES, SECTIONS, TABLES, edit_workspace


# wandb-workspaces uses a deprecated part of pydantic.
@pytest.mark.filterwarnings("ignore")
def test_the_view_has_the_scores_the_tables_and_a_section_for_each_question() -> None:
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is missing; pip install wandb-workspaces")
    view = edit_workspace("team/edits", name="mine")
    assert (view.entity, view.project, view.name) == ("team", "edits", "mine")
    assert [section.name for section in view.sections] == ["Did it work?", *SECTIONS]
    scores, scatter, *tables, report = view.sections[0].panels
    assert (scores.x, tuple(scores.y)) == (None, SCORES)
    assert (scatter.x.name, scatter.y.name) == ("edit/generality", "edit/locality")
    assert tuple(table.table_name for table in tables) == TABLES
    assert report.media_keys == [REPORT]
    # What save() sends to the server.
    sent = view._to_model().model_dump_json(by_alias=True)
    assert all(key in sent for key in (*SCORES, *TABLES, REPORT))


@pytest.mark.parametrize("project", ["edits", "/edits", "team/", "a/b/c", ""])
def test_a_project_needs_its_team(project: str) -> None:
    with pytest.raises(EditError, match=r'^edit_workspace: project must have the form "team/project", got '):
        edit_workspace(project)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(EditError, match="wandb-workspaces"):
        edit_workspace("team/edits")


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("edit/locality/kl", "What must stay?"),
        ("edit/drift/null_space_leak", "How far do the weights move?"),
        ("edit/tokens/active", "What is each token trained towards?"),
        ("edit/scope/parameters", "Where may the model change?"),
        ("edit/metrics/seconds", "How long does it take?"),
    ],
)
def test_each_series_is_in_one_section(key: str, section: str) -> None:
    assert [title for title, series in SECTIONS.items() if re.fullmatch(series, key)] == [section]
