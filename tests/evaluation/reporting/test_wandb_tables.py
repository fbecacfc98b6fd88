"""Tables and rows for experiment loggers."""

from __future__ import annotations

from kedit_train.data import Edit, Probe
from kedit_train.evaluation import evaluate
from kedit_train.evaluation.reporting import wandb_tables

EDIT = Edit("Ann lives in", "Oslo", old_target="Rome", locality={"near": (Probe("Bob lives in", ("Lima",)),)})


def test_tables_hold_the_answers_before_and_after(scripted_model):
    unedited = evaluate(*scripted_model({"Ann lives in": " Rome", "Bob lives in": " Lima"}), [EDIT], progress=False)
    model = scripted_model({"Ann lives in": " Oslo", "Bob lives in": " Oslo"})
    report = evaluate(*model, [EDIT], unedited=unedited, progress=False)
    columns, rows = wandb_tables.answers_table(report)
    assert columns == ["prompt", "target", "old_target", "before", "after", "right", "changed"]
    assert rows == [["Ann lives in", "Oslo", "Rome", "Rome", "Oslo", True, "changed"]]
    columns, rows = wandb_tables.changed_answers_table(report)
    assert columns == ["kind", "prompt", "before", "after", "right_before", "right"]
    assert rows == [["near", "Bob lives in", "Lima", "Oslo", True, False]]
    assert wandb_tables.answers_table(unedited)[1][0][-1] == ""


def test_one_row_per_token_position(scripted_model):
    report = evaluate(*scripted_model({"Ann lives in": " Oslo"}), [EDIT], progress=False)
    rows = list(wandb_tables.position_rows("edited", report))
    assert [row[:3] for row in rows] == [["edited", position, 1.0] for position in range(1, len(" Oslo") + 1)]
    assert all(len(row) == len(wandb_tables.POSITION_COLUMNS) for row in rows)
