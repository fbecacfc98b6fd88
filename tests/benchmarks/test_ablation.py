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
            assert name.endswith(f"({chosen})")
            assert recipe.callbacks(recipe.load(chosen))
            continue
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(chosen))
        kinds = [type(callback).__name__ for callback in recipe.callbacks(recipe.load(str(path)))]
        assert kinds[:2] == ["ParameterScope", "TokenLoss"]
        assert ("PolyakStep" in kinds) == ("PolyakStep" in name)
        assert ("KLLocality" in kinds) == ("KL penalty" in name)


def test_the_table_has_the_recorded_rows_in_the_order_of_the_variants(ablation: Any) -> None:
    rows = [json.loads(line) for line in ablation.RESULTS.read_text().splitlines()]
    names = [row["variant"] for row in rows]
    assert set(names) <= set(ablation.VARIANTS)
    assert len(names) == len(set(names))
    lines = ablation.table(rows).splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [n for n in ablation.VARIANTS if n in names]
    assert ablation.table(rows) in ablation.PAGE.read_text()
