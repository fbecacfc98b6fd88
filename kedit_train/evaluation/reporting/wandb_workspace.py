"""A saved view of a W&B project: the scores of the edits first, then one section per group of training metrics."""

from __future__ import annotations

from typing import Any

from kedit_train.errors import EditError
from kedit_train.optional import require

SCORES = ("edit/reliability", "edit/generality", "edit/portability", "edit/locality")
TABLES = ("edit/answers", "edit/changed_elsewhere")
REPORT = "edit/report"
# Section -> the regular expression of the series that it shows.
SECTIONS = {
    "What must stay?": "edit/(locality|router|forgetting)/.*",
    "How far do the weights move?": "edit/drift/.*",
    "What is each token trained towards?": "edit/tokens/.*",
    "Where may the model change?": "edit/(scope|gate)/.*",
    "How long does it take?": "edit/(metrics|cache|active)/.*",
}


def edit_workspace(project: str, *, name: str = "kedit-train") -> Any:
    """Return a view of a W&B project. Call ``save()`` on the result to create the view on the W&B server.

    The first section shows:

    - the scores of the edits during training;
    - a scatter plot of locality and generality, with one point per run;
    - two tables of answers;
    - the report.

    Each of the other sections plots one group of metrics. The section titles are questions, such as "What must stay?".

    Args:
        project: the team or user, and the project, as ``"team/project"``.
        name: the name of the view.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``, which can still be changed.

    Raises:
        EditError: ``project`` does not name a team and a project, or wandb-workspaces is not installed.
    """
    entity, _, own = project.partition("/")
    if not entity or not own or "/" in own:
        raise EditError(f'project must have the form "team/project", got {project!r}.', component="edit_workspace")
    with require("wandb-workspaces"):
        from wandb_workspaces import workspaces  # pyright: ignore[reportMissingImports]
        from wandb_workspaces.reports import v2 as panels  # pyright: ignore[reportMissingImports]

    # With x=None, W&B uses the training step that each logger has defined for the series edit/*.
    first: list[Any] = [panels.LinePlot(title="scores of the edits", x=None, y=list(SCORES), range_y=(0.0, 1.0))]
    axes = {"x": panels.SummaryMetric("edit/generality"), "y": panels.SummaryMetric("edit/locality")}
    first.append(panels.ScatterPlot(title="locality over generality", **axes))
    first += [panels.WeavePanelSummaryTable(table_name=table) for table in TABLES]
    first.append(panels.MediaBrowser(title="report", media_keys=[REPORT], num_columns=1))
    sections = [workspaces.Section(name="Did it work?", panels=first, is_open=True)]
    for title, series in SECTIONS.items():
        plot = panels.LinePlot(title=title, x=None, metric_regex=series)
        sections.append(workspaces.Section(name=title, panels=[plot], is_open=True))
    return workspaces.Workspace(entity=entity, project=own, name=name, sections=sections)
