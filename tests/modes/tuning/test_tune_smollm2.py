"""``tune`` on a pretrained model: it learns all edits with the defaults, and keeps most of the other answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_models import smollm2

from kedit_train import EditDataset, load_model, tune
from kedit_train.modes import TuneGrid

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_settings_for_a_pretrained_model(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(smollm2()))
    edits = EditDataset.load(ROOT / "recipes" / "smollm2" / "facts.jsonl").sample(16)
    keep = ROOT / "recipes" / "smollm2" / "keep.txt"
    grid = TuneGrid(kl_weights=[0])
    result = tune(model, tokenizer, edits, keep=keep, grid=grid, folder=tmp_path, progress=False)
    assert result.meta["protocol"] == "leading,probability"
    assert result.meta["append_eos"] is False
    assert result.picked.reliable
    # The settings hold for edits that they were not chosen on.
    assert result.held_out.reliability is not None
    assert result.held_out.reliability >= 0.75
    assert result.held_out.locality is not None
    assert result.held_out.locality >= 0.4
    assert len(list(tmp_path.glob("factors-*.safetensors"))) == 1
