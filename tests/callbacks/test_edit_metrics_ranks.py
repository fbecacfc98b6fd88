"""EditMetrics on two processes that share the edits: the scores of a single process, at the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import close, started

SCRIPT = Path(__file__).with_name("edit_metrics_ranks.py")
BOUNDS = {"rel": 1e-3, "abs": 1e-5}


@pytest.mark.slow
def test_two_processes_share_the_edits_and_get_the_scores_of_one(tmp_path: Path) -> None:
    runs = [started(SCRIPT, tmp_path, rank, size) for rank, size in ((0, 1), (0, 2), (1, 2))]
    for run in runs:
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
    alone, first, second = (json.loads((tmp_path / f"found-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first["report"] == second["report"]
    close(first["report"], alone["report"], **BOUNDS)
    assert first["report"]["locality"]["kl"]["value"] > 0
    for found in (alone, first, second):
        # Both processes skip the same evaluations. An evaluation with only one of the two processes would never end.
        assert found["skipped"] == 2
    rows = [[row for row in found["history"] if "edit/reliability" in row] for found in (alone, first)]
    assert [row["step"] for row in rows[1]] == [1, 3]
    assert "edit/locality_kl" in rows[1][0]
    timed = ("edit/metrics/seconds", "edit/metrics/share_of_time")
    for expected_row, row in zip(*rows, strict=True):
        actual, expected = ({k: v for k, v in r.items() if k not in timed} for r in (row, expected_row))
        close(actual, expected, **BOUNDS)
