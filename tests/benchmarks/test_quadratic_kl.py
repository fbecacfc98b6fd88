"""The quadratic estimates of a divergence: the estimate in the hidden space by its formula, and the recorded rows."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def quadratic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("quadratic_kl")


def test_the_variance_of_the_logits_is_the_quadratic_form_of_the_covariance_of_the_head(quadratic: Any) -> None:
    torch.manual_seed(0)
    rows, change = torch.randn(7, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    before = torch.randn(7, dtype=torch.float64).softmax(-1)
    mean = before @ rows
    covariance = sum(p * torch.outer(row - mean, row - mean) for p, row in zip(before, rows, strict=True))
    found = quadratic.variance(before[None], (rows @ change)[None])
    torch.testing.assert_close(found, (change @ covariance @ change)[None])
    # To second order, the divergence is half of this variance.
    logits = before.log()
    step = 1e-4
    after = (logits + step * (rows @ change)).log_softmax(-1)
    exact = (before * (before.log() - after)).sum() / step**2
    torch.testing.assert_close(0.5 * found[0], exact, rtol=1e-3, atol=0.0)


def test_the_page_has_the_recorded_rows(quadratic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in quadratic.RESULTS.read_text().splitlines()]
    assert [(row["change"], row["factor"]) for row in rows] == [
        (change, factor) for change in quadratic.LAYERS for factor in quadratic.FACTORS
    ]
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quadratic, "PICTURE", tmp_path / "plot.png")
    assert quadratic.report() == quadratic.PAGE.read_text()
