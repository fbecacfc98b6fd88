"""DeepSpeed ZeRO-1 and ZeRO-2 on two gloo processes: constraints are exact, and the weights are those of one process.

The tests are skipped if DeepSpeed is not installed. On a CPU, DeepSpeed compiles an extension in its first run, which
takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import zero
from conformance.test_fsdp2 import SCOPE, TESTS, base, leak
from safetensors.torch import load_file

from kedit_train import EditDelta

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    path = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "conformance.zero", str(folder), "1", "2"]
    done = subprocess.run(
        command, cwd=TESTS, env={**os.environ, **path}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert (folder / "refused-1.json").exists(), done.stderr[-3000:]
    zero.main(folder, [0])
    return folder


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("case", zero.CASES)
def test_zero_ends_with_the_weights_of_one_process(case: str, stage: int, folder: Path) -> None:
    first, second, alone = (
        load_file(folder / f"{case}-{which}.safetensors") for which in (f"{stage}-0", f"{stage}-1", "0-0")
    )
    for name, before in base().items():
        assert torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)), name
        if name not in SCOPE:
            assert torch.equal(first[name].view(torch.int32), before.view(torch.int32)), name
            continue
        assert (first[name] - alone[name]).norm() < 1e-3 * (alone[name] - before).norm(), name
    delta = EditDelta.load(folder / f"{case}-{stage}.delta.safetensors")
    for name in SCOPE:
        assert torch.equal(delta.changes[name].select(first[name]), delta.changes[name].after)


@pytest.mark.parametrize("stage", [1, 2])
def test_mask_and_ball_are_exact(stage: int, folder: Path) -> None:
    after, before = load_file(folder / f"exact-{stage}-0.safetensors"), base()
    for name in SCOPE:
        held = before[name].abs().flatten().argsort()[: before[name].numel() // 2]
        assert torch.equal(*(w[name].flatten()[held].view(torch.int32) for w in (after, before)))
        assert int((after[name] != before[name]).sum()) > 0.9 * len(held)
        assert float((after[name].double() - before[name].double()).abs().max()) <= 2e-3


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("case", ["null space", "accumulated"])
def test_the_outputs_on_the_texts_of_the_null_space_do_not_change(case: str, stage: int, folder: Path) -> None:
    assert leak(load_file(folder / f"{case}-{stage}-0.safetensors")) < 1e-5


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("ZeRO-3", "ZeRO-3 divides each weight among the processes; use DDP, FSDP2"),
        ("bf16", "the DeepSpeed config enables bf16 or fp16"),
    ],
)
def test_other_configurations_are_refused(what: str, why: str, folder: Path) -> None:
    for rank in range(2):
        message = json.loads((folder / f"refused-{rank}.json").read_text())[what]
        assert why in message
        assert "\n" not in message
