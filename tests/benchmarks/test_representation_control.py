"""The benchmark of representation control: its tables are those of its rows, and nothing is scored that was trained."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results.md"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("representation_control")


def test_the_prompts_for_training_for_settings_and_for_scores_differ(bench: Any) -> None:
    parts = [bench.TRAINED, bench.CHOSEN_ON, *bench.REPORTED.values()]
    assert [len(part) for part in parts] == [72, 12, 30, 30]
    assert len(set().union(*parts)) == sum(map(len, parts))


def test_the_value_function_reads_no_rephrase_and_no_scored_neighbor(bench: Any) -> None:
    edits = bench.facts(0)
    assert not {edit.id for edit in edits} & {edit.id for edit in bench.facts(10)}
    trained = {record["prompt"] for record in bench.given_responses(edits)}
    scored = {prompt for edit in edits for prompt in edit.rephrases}
    scored |= {edit.locality["neighbors"][-1].prompt for edit in edits}
    assert not trained & scored
    reward = bench.FactReward(edits)
    records = bench.given_responses(edits)
    given = reward([r["prompt"] for r in records], [r["response"] for r in records])
    # For each fact: the new and the old answer, and for two neighbors the right and a wrong answer.
    assert given == [1.0, -1.0, 1.0, 0.0, 1.0, 0.0] * 10


def test_the_tables_of_the_page_are_those_of_the_rows(bench: Any) -> None:
    rows = bench.read_rows(bench.RESULTS)
    page = PAGE.read_text(encoding="utf-8")
    tables = [table for part in bench.COLUMNS for table in bench.tables(part, rows)]
    assert [len(table.splitlines()) for table in tables] == [5, 5, 5]
    assert all(table in page for table in tables)


def test_control_raises_the_reward_and_states_no_new_fact(bench: Any) -> None:
    rows = bench.read_rows(bench.RESULTS)
    for name in bench.REPORTED:
        rewards = {row["method"]: row["reward"] for row in rows if row.get("prompts") == name}
        assert rewards["control"] > rewards["plain"]
    facts = {row["method"]: row["new fact"] for row in rows if row["part"] == "facts"}
    assert facts["control"] < 0.5 * facts["kedit_default"]
