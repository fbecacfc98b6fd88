"""Task arithmetic: the four sets of facts relate as their names say, and the tables show means over the seeds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("task_arithmetic")


def test_the_sets_relate_as_their_names_say(arithmetic: Any) -> None:
    sets = arithmetic.facts(0)
    of = {name: {edit.prompt: edit.target for edit in edits} for name, edits in sets.items()}
    assert {name: len(facts) for name, facts in of.items()} == dict.fromkeys(arithmetic.SETS, arithmetic.FACTS)
    # The aligned set gives the same answers in other words, in the same order.
    assert [e.target for e in sets["aligned"]] == [e.target for e in sets["A"]]
    assert not of["aligned"].keys() & of["A"].keys()
    # The contradictory set gives another answer to each prompt.
    assert of["contradictory"].keys() == of["A"].keys()
    assert all(of["contradictory"][prompt] != target for prompt, target in of["A"].items())
    # No name of the irrelevant set occurs in the other sets.
    rivers = {prompt.split()[2] for prompt in of["irrelevant"]}
    assert not any(river in prompt for river in rivers for prompt in of["A"])
    assert arithmetic.facts(0) == sets != arithmetic.facts(1)


def test_the_tables_show_means(arithmetic: Any) -> None:
    row = {"training": "LoRA", "what": "unlearned", "coefficient": 0.5, "A": 0.5, "aligned": 1.0, "irrelevant": 1.0}
    rows = [{**row, "seed": 0, "KL": 0.1}, {**row, "seed": 1, "KL": 0.2, "A": 0.0}]
    assert arithmetic.unlearning_table(rows)[-1] == "| LoRA | 0.5 | 0.25 | 1.00 | 1.00 | 0.150 |"
    row = {"training": "dense", "what": "added", "other": "aligned", "cosine": 0.5, "A": 1.0, "set": 0.5, "KL": 0.1}
    rows = [{**row, "seed": 0, "set alone": 1.0}, {**row, "seed": 1, "set alone": 0.9}]
    assert arithmetic.addition_table(rows)[-1] == "| dense | aligned | 0.50 | 1.00 | 0.50 | 0.95 | 0.100 |"
