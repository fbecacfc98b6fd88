"""The comparison of precisions: its table shows the means over the seeds, without bases that were not measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def precision(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("precision")


def test_the_table_shows_means(precision: Any) -> None:
    row = {"base": "8bit", "reliability": 1.0, "generality": 0.5, "kl": 0.02, "base_kl": 0.01, "megabytes": 163.0}
    rows = [{**row, "locality": locality, "seconds": 40.0} for locality in (0.5, 0.75)]
    heading, _, only = precision.table(rows)
    assert heading.startswith("| base model | weights, MB | reliability |")
    assert only == "| 8 bit | 163 | 1.00 | 0.50 | 0.62 | 0.0200 | 0.0100 | 40 |"


def test_no_text_is_both_trained_and_measured(precision: Any) -> None:
    held = precision.options().prose
    assert len(held) == precision.HELD_TEXTS
    assert not set(held) & set(precision.texts()[: precision.TRAINED_TEXTS])
