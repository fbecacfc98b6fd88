"""DDP on two gloo processes: both get the same weights, which are those of a single process up to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import ranks
from conformance.hosts import HOSTS
from conformance.settings import ADAPTED, SETTINGS, in_scope, load, one_host_each
from safetensors.torch import load_file
from torch import Tensor

from kedit_train import world

TESTS = Path(__file__).resolve().parents[1]
# These callbacks do not change the trained weights.
NEUTRAL = ("ParameterScope", "EditMetrics", "ForecastMetrics", "PrefixCache", "SaveDelta")
# These callbacks take steps of Adam, which enlarges rounding differences of gradients that are nearly 0.
STEPS_OF_ADAM = ("PolyakStep", "SecondOrderLocality", "SubjectValues")
# A penalty, a loss, a mask, scores and a rule that ends training: one callback for each way to act on a run.
IN_DEFAULT_RUN = (
    "ParameterScope",
    "TokenLoss",
    "KLLocality",
    "GradientMask",
    "EditMetrics",
    "StopWhenEdited",
    "ForgettingBudget",
    "OutputAnchor",
)
SCOPED = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Run all selected (callback, host) pairs on two processes and on one; return the folder of the weights."""
    folder = tmp_path_factory.mktemp("ranks")
    pairs: set[tuple[str, str]] = set()
    for item in request.session.items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if item.path == Path(__file__) and "host" in parameters:
            # The comparison needs ParameterScope alone as well.
            name = parameters.get("callback", ranks.TOGETHER)
            pairs |= {(name, parameters["host"]), ("ParameterScope", parameters["host"])}
    (folder / "pairs.json").write_text(json.dumps(sorted(pairs)))
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "conformance.ranks", str(folder)]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert (folder / "refused-1.json").exists(), done.stderr[-3000:]
    ranks.main(folder)
    return folder


def weights(folder: Path, host: str, callback: str, which: str) -> dict[str, Tensor]:
    path = folder / f"{host}-{callback}-{which}.safetensors"
    failure = path.with_suffix(".txt")
    assert path.exists(), failure.read_text() if failure.exists() else f"{callback} was not run in {host}"
    return load_file(path)


def base() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in world.load()[0].named_parameters()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


@pytest.mark.parametrize(("callback", "host"), one_host_each(SETTINGS, HOSTS, only=IN_DEFAULT_RUN))
def test_two_processes_end_with_the_weights_of_one(callback: str, host: str, folder: Path) -> None:
    first, second, alone = (weights(folder, host, callback, which) for which in ("2-0", "2-1", "1-0"))
    plain = weights(folder, host, "ParameterScope", "1-0")
    for name, before in base().items():
        assert torch.equal(bits(first[name]), bits(second[name])), name
        if name != SCOPED:
            assert torch.equal(bits(first[name]), bits(before)), name
            continue
        moved = (alone[name] - before).norm()
        assert moved > 0
        # The sum over two processes has another order, so a few weights may be rounded in the other direction.
        rounding = torch.finfo(before.dtype).eps * before.abs().max()
        tolerance = (1e-3 if callback in STEPS_OF_ADAM else 1e-5) * moved + rounding
        assert (first[name] - alone[name]).norm() < tolerance
        # The callback itself changes the weights by more than the rounding, unless it is neutral.
        effect = float((alone[name] - plain[name]).norm() / (plain[name] - before).norm())
        assert effect < 1e-5 if callback in NEUTRAL else effect > 5e-5


@pytest.mark.parametrize(("callback", "host"), one_host_each(ADAPTED, HOSTS, only=()))
def test_two_processes_train_the_adapter_of_one(callback: str, host: str, folder: Path) -> None:
    first, second, alone = (weights(folder, host, callback, which) for which in ("2-0", "2-1", "1-0"))
    for name, before in load(callback)[0].named_parameters():
        assert torch.equal(bits(first[name]), bits(second[name])), name
        if name not in in_scope([name]):
            assert torch.equal(bits(first[name]), bits(before.detach())), name
            continue
        moved = (alone[name] - before.detach()).norm()
        assert moved > 0
        rounding = torch.finfo(before.dtype).eps * before.detach().abs().max()
        assert (first[name] - alone[name]).norm() < 1e-4 * moved + rounding


# Two hosts in the default run: one with its own loop, and one where the user writes the loop.
@pytest.mark.parametrize(
    "host", [pytest.param(host, marks=() if host in ("Trainer", "loop") else pytest.mark.slow) for host in HOSTS]
)
def test_scope_mask_and_ball_are_exact_under_adam(host: str, folder: Path) -> None:
    first, second, alone = (weights(folder, host, ranks.TOGETHER, which) for which in ("2-0", "2-1", "1-0"))
    for name, before in base().items():
        assert torch.equal(bits(first[name]), bits(second[name])), name
        if "layers.2.mlp.down_proj" not in name and "layers.3.mlp.down_proj" not in name:
            assert torch.equal(bits(first[name]), bits(before)), name
            continue
        moved = first[name] != before
        assert 0 < int(moved.sum()) <= round(0.5 * moved.numel()) + 1
        assert float((first[name].double() - before.double()).abs().max()) <= 2e-3
        assert (first[name] - alone[name]).norm() < 1e-3 * (alone[name] - before).norm(), name


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("fsdp1", "constraints on the weights cannot be enforced with this training strategy"),
        ("the model of DDP", "DistributedDataParallel wrapped the model before the edit began"),
        ("DDP itself", "DistributedDataParallel wrapped the model before the edit began"),
        ("a trainer", "DistributedDataParallel wrapped the model before the edit began"),
    ],
)
def test_an_unsupported_strategy_is_an_error_before_the_first_step(what: str, why: str, folder: Path) -> None:
    for rank in range(2):
        message = json.loads((folder / f"refused-{rank}.json").read_text())[what]
        assert message.startswith(f"after 0 steps: {why}"), message
        assert "\n" not in message


def test_late_freezing_works_if_ddp_finds_unused_parameters(folder: Path) -> None:
    in_time = weights(folder, "Trainer", "ParameterScope", "2-0")
    for rank in range(2):
        late = load_file(folder / f"late-{rank}.safetensors")
        assert [name for name in in_time if not torch.equal(bits(late[name]), bits(in_time[name]))] == []
