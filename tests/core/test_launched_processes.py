"""A single process of a launcher that was asked for several is an error before the first step."""

from __future__ import annotations

import os

import pytest
import torch
from conformance.hosts import HOSTS
from torch import nn

from kedit_train import world
from kedit_train.callbacks import ParameterScope, editing
from kedit_train.core import processes
from kedit_train.core.processes import check_launcher
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

# What accelerate 1.15 sets for --num_processes 2 --cpu. For one process, it does not set MASTER_ADDR and MASTER_PORT.
ALONE = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}
SEVERAL = {**ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_several_requested_processes_must_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment in ({}, ALONE, {"MASTER_ADDR": "127.0.0.1"}):
        check_launcher(environment)
    for size in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        check_launcher({**SEVERAL, size: "2"})
    with pytest.raises(EditError, match=r"asked for several processes but started one.*use torchrun") as error:
        check_launcher(SEVERAL)
    assert len(str(error.value)) <= 250
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    check_launcher(SEVERAL)


@pytest.mark.parametrize("host", ["Trainer", "Lightning", "loop"])
def test_a_run_in_a_single_process_of_several_is_an_error(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SEVERAL.items():
        monkeypatch.setenv(name, value)
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    model, tokenizer = world.load()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(EditError, match="asked for several processes but started one"):
        HOSTS[host](model, tokenizer, EditDataset(world.edits(n=4)), [ParameterScope(2)], 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_ordinary_run_reads_the_environment() -> None:
    assert "ACCELERATE_USE_CPU" not in os.environ
    with editing(nn.Linear(2, 2), [ParameterScope(modules="weight")]) as edit:
        edit.before_step()
        edit.run.close()
