"""The ablation: every variant is a recipe that loads, and the recorded rows belong to variants."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kedit_train.cli import recipe

HERE = Path(__file__).parent


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("ablation")


def test_every_variant_loads_with_the_callbacks_that_it_names(ablation: Any, tmp_path: Path) -> None:
    for number, (name, chosen) in enumerate(ablation.VARIANTS.items()):
        if isinstance(chosen, str):
            assert name.endswith((f"({chosen})", " texts"))
            assert recipe.callbacks(recipe.load(chosen))
            continue
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(chosen))
        kinds = [type(callback).__name__ for callback in recipe.callbacks(recipe.load(str(path)))]
        assert kinds[:2] == ["ParameterScope", "TokenLoss"]
        assert ("KLLocality" in kinds) == ("KL penalty" in name)
        assert ("WeightAnchor" in kinds) == ("K-FAC penalty" in name)
        assert ("SecondOrderLocality" in kinds) == ("second-order" in name or name == "the same with null space")
        assert ("PolyakStep" in kinds) or "PolyakStep" not in name


def test_every_variant_is_in_a_table(ablation: Any) -> None:
    assert {name for labels in ablation.TABLES.values() for name in labels.values()} == set(ablation.VARIANTS)


def test_the_tables_have_the_recorded_rows_in_the_order_of_the_labels(ablation: Any) -> None:
    rows = [json.loads(line) for line in ablation.RESULTS.read_text().splitlines()]
    names = [row["variant"] for row in rows]
    assert set(names) <= set(ablation.VARIANTS)
    assert len(names) == len(set(names))
    page = ablation.PAGE.read_text()
    assert ablation.report(rows, page) == page
    for labels in ablation.TABLES.values():
        lines = ablation.table(rows, labels).splitlines()[2:]
        shown = [label for label, name in labels.items() if name in names]
        assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == shown
