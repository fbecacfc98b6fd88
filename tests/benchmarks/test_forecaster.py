"""The forecaster benchmark: the page of OutputAnchor has a table of the recorded rows, and a run reproduces them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "callbacks" / "output_anchor.md"
CHANGE = "change of other forecasts"


def rows_by_method() -> dict[str, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (HERE / "forecaster.jsonl").read_text().splitlines()]
    methods = dict.fromkeys(row["method"] for row in rows)
    return {method: [row for row in rows if row["method"] == method] for method in methods}


def test_the_table_of_the_page_is_that_of_the_rows():
    methods, page = rows_by_method(), PAGE.read_text()
    assert [len(rows) for rows in methods.values()] == [3] * 4
    for method, rows in methods.items():
        name = method if method == "fine-tuning" else f"with `{method}`"
        error, change = mean(row["error"] for row in rows), mean(row[CHANGE] for row in rows)
        assert f"| {name} | {error:.3f} | {change:.2f} |" in page


def test_the_anchor_halves_the_change_at_nearly_the_same_error():
    methods = rows_by_method()
    plain = methods.pop("fine-tuning")
    for rows in methods.values():
        for row, without in zip(rows, plain, strict=True):
            assert row["seed"] == without["seed"]
            assert row["error"] < 1.04 * without["error"]
            assert row[CHANGE] < 0.5 * without[CHANGE]


@pytest.mark.slow
def test_a_run_reproduces_a_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))
    forecaster = importlib.import_module("forecaster")
    found = forecaster.run(1, steps=800, rate=2e-3, weights=[1.0])
    methods = rows_by_method()
    expected = [methods["fine-tuning"][0], methods["OutputAnchor(weight=1.0)"][0]]
    for row, other in zip(found, expected, strict=True):
        assert row["method"] == other["method"]
        # Another processor rounds differently, and training enlarges the difference.
        assert row["error"] == pytest.approx(other["error"], rel=0.1)
        assert row[CHANGE] == pytest.approx(other[CHANGE], rel=0.3)
