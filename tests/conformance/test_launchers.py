"""accelerate launch, torchrun, fabric run and lightning run: one run on two processes, or a clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kedit_train.cli.launcher import free_port

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parents[1]
SCRIPT = str(TESTS / "conformance" / "launched.py")
# Name of the launcher -> its command, with the option for the port.
COMMANDS: dict[str, tuple[Sequence[str], str]] = {
    # --multi_gpu starts several processes on CPUs, too.
    "accelerate launch": (("accelerate", "launch", "--multi_gpu", "--num_processes", "2"), "--main_process_port"),
    "accelerate launch --cpu": (("accelerate", "launch", "--cpu", "--num_processes", "2"), "--main_process_port"),
    "torchrun": (("torchrun", "--nproc-per-node", "2"), "--master-port"),
    "fabric run": (("fabric", "run", "--devices", "2"), "--main-port"),
    "lightning run": (("lightning", "run", "--devices", "2"), ""),
}
INHERITED = ("LT_", "PL_", "ACCELERATE_")


def launch(launcher: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Start the script with a launcher, and return the content of the files that it wrote."""
    (program, *options), port = COMMANDS[launcher]
    options += [port, str(free_port())] if port else []
    keep = {k: v for k, v in os.environ.items() if not k.startswith(INHERITED) and k not in ("WORLD_SIZE", "RANK")}
    environment = keep | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [str(Path(sys.executable).parent / program), *options, SCRIPT, arguments[0], str(folder), *arguments[1:]]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    assert found, ended.stderr
    return found


@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [
        ("accelerate launch", ("Trainer",)),
        ("torchrun", ("Trainer",)),
        ("torchrun", ("Lightning", "2")),
        ("fabric run", ("Trainer",)),
        ("lightning run", ("Trainer",)),
    ],
)
def test_two_processes_train_one_model(launcher: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    found = launch(launcher, tmp_path, *arguments)
    assert list(found) == ["run-0.json", "run-1.json"]
    assert [run["processes"] for run in found.values()] == [2, 2]
    assert found["run-0.json"]["weights"] == found["run-1.json"]["weights"]


@pytest.mark.parametrize(
    ("launcher", "host", "why"),
    [
        ("accelerate launch --cpu", "Trainer", "asked for several processes but started one"),
        ("torchrun", "Lightning", "2 processes were started but the trainer uses 1"),
        ("fabric run", "Lightning", "2 processes were started but the trainer uses 1"),
        ("torchrun", "loop", "2 processes were started but are not connected"),
    ],
)
def test_any_other_number_of_processes_is_an_error(launcher: str, host: str, why: str, tmp_path: Path) -> None:
    found = launch(launcher, tmp_path, host)
    assert all(name.startswith("refused-") for name in found)
    assert all(why in message and "\n" not in message for message in found.values())
