"""Killed in the middle and resumed, an edit ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import resuming

from kedit_train.core.state_file import FILE, load_state, save_state
from kedit_train.errors import EditError

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer", "Lightning"])
def test_sigkill_and_resume_end_where_the_uninterrupted_run_ends(host: str, tmp_path: Path) -> None:
    whole = resuming.train(host, tmp_path / "whole")
    script = [sys.executable, "-m", "conformance.resuming", host, str(tmp_path / "killed")]
    dead = subprocess.run(
        script, cwd=TESTS, env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, check=False
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()[-2000:]
    resumed = resuming.train(host, tmp_path / "killed", resume=True)
    different = [
        name for name in whole if not torch.equal(whole[name].view(torch.int32), resumed[name].view(torch.int32))
    ]
    assert different == []


def test_a_checkpoint_without_the_edits_state_is_refused(tmp_path: Path) -> None:
    resuming.train("Trainer", tmp_path, steps=2)
    (tmp_path / "checkpoint-2" / FILE).unlink()
    with pytest.raises(EditError, match="the checkpoint contains no state of this edit"):
        resuming.train("Trainer", tmp_path, resume=True)


def test_state_files_are_whole_or_refused(tmp_path: Path) -> None:
    state = {"step": 3, "reference": {"a.b": torch.randn(2, 3)}, "callbacks": {"K.0": {"drawn": 4}, "N.0": {}}}
    path = save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded["reference"].pop("a.b"), state["reference"].pop("a.b"))  # type: ignore[attr-defined]
    assert loaded == state
    assert load_state(tmp_path / "elsewhere") is None
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(EditError, match="is no whole state of an edit"):
        load_state(tmp_path)
