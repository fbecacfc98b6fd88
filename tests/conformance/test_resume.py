"""Resuming: a killed and resumed edit ends with the same weights as an uninterrupted one."""

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
from kedit_train.safetensors_file import save_tensors

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
# The default run kills runs in test_kills.py.
@pytest.mark.slow
@pytest.mark.parametrize("host", ["SFTTrainer", "Trainer", "Lightning"])
def test_a_killed_and_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(host: str, tmp_path: Path) -> None:
    uninterrupted = resuming.train(host, tmp_path / "whole")
    script = [sys.executable, "-m", "conformance.resuming", host, str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    killed = subprocess.run(script, cwd=TESTS, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    resumed = resuming.train(host, tmp_path / "killed", resume=True)
    different = [
        name
        for name in uninterrupted
        if not torch.equal(uninterrupted[name].view(torch.int32), resumed[name].view(torch.int32))
    ]
    assert different == []


def test_a_checkpoint_without_the_state_of_the_edit_is_an_error(tmp_path: Path) -> None:
    resuming.train("Trainer", tmp_path, steps=2)
    (tmp_path / "checkpoint-2" / FILE).unlink()
    with pytest.raises(EditError, match="the checkpoint contains no state of this edit"):
        resuming.train("Trainer", tmp_path, resume=True)


def test_a_damaged_state_file_is_an_error(tmp_path: Path) -> None:
    state = {"step": 3, "reference": {"a.b": torch.randn(2, 3)}, "callbacks": {"K.0": {"drawn": 4}, "N.0": {}}}
    path = save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded["reference"].pop("a.b"), state["reference"].pop("a.b"))  # type: ignore[attr-defined]
    assert loaded == state
    assert load_state(tmp_path / "elsewhere") is None
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(EditError, match=r"the state of the edit in .* cannot be used"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"reference": {"w": {"__tensor__": "v"}}}, "must name a tensor of this file, got 'v'"),
        ({"reference": {"w": {"__tensor__": ["w"]}}}, r"must name a tensor of this file, got \['w'\]"),
        ({"reference": {"w": {"__tensor__": {}}}}, "must name a tensor of this file, got {}"),
        ({"__tensor__": "w"}, "the metadata must be a mapping, got Tensor"),
        ([], "the metadata must be a mapping, got list"),
    ],
)
def test_a_state_whose_metadata_do_not_fit_its_tensors_is_an_error(tmp_path: Path, metadata, problem: str) -> None:
    """The checksum of such a file can be right, since it can be computed again."""
    save_tensors(tmp_path / FILE, {"w": torch.ones(2)}, metadata, kind="kedit_train.state")
    with pytest.raises(EditError, match=f"the state of the edit in .* cannot be used; .*{problem}") as error:
        load_state(tmp_path)
    assert "\n" not in str(error.value)
