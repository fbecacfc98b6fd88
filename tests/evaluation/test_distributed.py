"""Two processes split the edits, and each gets the report that one process gets alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation import distributed_script
from ranks import close, started

from kedit_train.evaluation.scoring import probe_results

SCRIPT = Path(__file__).with_name("distributed_script.py")
# Fractions are equal bit for bit. Sums may differ by rounding.
BOUNDS = {"rel": 1e-4, "abs": 2e-6}


def test_two_processes_get_the_same_report_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [started(SCRIPT, tmp_path, rank, size) for rank, size in ((0, 2), (1, 2))]
    # The script sets this constant, and is run in this process too.
    monkeypatch.setattr(probe_results, "FLUENCY_TOKENS", probe_results.FLUENCY_TOKENS)
    distributed_script.main(tmp_path, 0, 1)
    for run in runs:
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
    alone, first, second = (
        json.loads((tmp_path / f"report-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert first["metrics"] == second["metrics"]
    assert first["answers"] == second["answers"]
    for part in ("metrics", "unedited"):
        close(first[part], alone[part], **BOUNDS, path=part)
    assert [r["answer"] for r in first["answers"]] == [r["answer"] for r in alone["answers"]]
    assert first["metrics"]["locality"]["kl"]["value"] > 0
    means = [json.loads((tmp_path / f"mean-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]
    assert means[0] == means[1] == means[2]
    assert means[0][:2] == [pytest.approx(3.0 / 7), 7.0]
    errors = [(tmp_path / f"error-{name}.txt").read_text() for name in ("1-0", "2-0", "2-1")]
    assert errors[0] == errors[1] == errors[2]
    assert "too long" in errors[0]
