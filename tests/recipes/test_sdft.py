"""recipes/sdft.py trains only if the teacher follows the facts in its context."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from installed import needs

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "sdft.py"


@needs("trl", "1.16")
def test_a_teacher_that_follows_no_fact_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["--model", "world", "--edits", "world", "--texts", "world", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sdft.py", *given])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(RECIPE), run_name="__main__")
    # The bundled model hardly follows facts in its context.
    assert str(error.value) == (
        "error: With the fact in its context, the model gives the new answer to 1 of 24 prompts, but SDFT needs at "
        "least half of them; use a larger model."
    )
    assert "the model gives the new answer to 1 of 24 prompts\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_recipe_is_short() -> None:
    lines = RECIPE.read_text().splitlines()
    assert len(lines) <= 60
    assert all(len(line) <= 120 for line in lines)
