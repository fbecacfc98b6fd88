"""The ability study: its table and its figure show the means over the reported seeds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("ability_study")


def rows(study: Any) -> list[dict[str, Any]]:
    before = {"method": "ft_m", "edits": 0, **dict.fromkeys(study.ABILITIES, 0.8), "perplexity": 20.0}
    scores = dict.fromkeys(("reliability", "generality", "question", "others"), 0.5)
    after = {**before, "edits": 10, **scores, "seconds": 3.0}
    return [
        *({**before, "seed": seed} for seed in (10, 11, 100)),
        {**after, "seed": 10, "reading": 0.6},
        {**after, "seed": 11, "reading": 0.4},
        {**after, "seed": 100, "reading": 0.0},
    ]


def test_the_table_shows_means_of_the_reported_seeds(study: Any) -> None:
    *_, unedited, edited = study.table(rows(study))
    assert unedited == "| none (unedited) | 0 | 0.80 | 0.80 | 0.80 | 0.80 | 20.0 | – | – | – | – | – |"
    assert edited == "| FT-M | 10 | 0.80 | 0.80 | 0.80 | 0.50 | 20.0 | 0.50 | 0.50 | 0.50 | 0.50 | 3.0 |"


def test_the_figure_is_drawn(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(study, "FIGURE", tmp_path / "figure.png")
    study.figure(rows(study))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
