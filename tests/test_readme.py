"""Every Python snippet of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
TITLES = ["SFTTrainer(", "L.Trainer(", "editing(", "evaluate("]


def test_the_readme_shows_every_host() -> None:
    assert [any(title in snippet for snippet in SNIPPETS) for title in TITLES] == [True] * 4


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: next((t for t in TITLES if t in s), "other"))
def test_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(snippet, "README.md", "exec"), names)
    if "EditMetrics(" in snippet:
        trainer = names["trainer"]
        callbacks = getattr(trainer, "callbacks", None) or trainer.callback_handler.callbacks  # type: ignore[attr-defined]
        (metrics,) = [c for c in callbacks if type(c).__name__ == "EditMetrics"]
        assert metrics.report.metrics["reliability"]["generated"].value >= 0.95
