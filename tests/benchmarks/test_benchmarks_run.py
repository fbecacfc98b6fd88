"""The benchmarks run and write their sections; what they measure is not looked at."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("script", "section", "row"),
    [
        ("step_time.py --only (b) (d)_loss_head (e)", "## Time of a step, tiny", "| (b) "),
        pytest.param(
            "equal_reliability.py", "## Edits a second at equal reliability, small", "| (b) ", marks=pytest.mark.slow
        ),
        pytest.param("integrity.py", "## Cost of the integrity checks, tiny", "| the checks", marks=pytest.mark.slow),
        pytest.param("arithmetic.py", "## Arithmetic with edits, world, tiny", "|---", marks=pytest.mark.slow),
        pytest.param("evaluation.py", "## Evaluation, factlm, tiny", "|---", marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_writes_its_section_in_place(shared, tmp_path, monkeypatch, script, section, row):
    results = tmp_path / "RESULTS.md"
    results.write_text(f"# Before\n\n## First\n\n1\n\n{section}\n\nof the last run\n\n## Last\n\n2\n")
    name, *options = script.split()
    # In this process, which has imported what takes the time.
    monkeypatch.syspath_prepend(str(HERE))
    options = [option.replace("_", " ") for option in options]
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--results", str(results), *options])
    runpy.run_path(str(HERE / name), run_name="__main__")
    found = results.read_text()
    assert found.index("## First\n\n1\n") < found.index(section) < found.index("## Last\n\n2\n")
    assert "of the last run" not in found
    assert row in found
