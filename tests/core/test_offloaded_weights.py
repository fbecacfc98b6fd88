"""Frozen weights on the meta device, which accelerate loads from the CPU or the disk for each forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from core.small_loop import model, sgd, step, train
from torch import nn

from kedit_train import world
from kedit_train.callbacks import NormBall, ParameterScope, PrefixCache, SaveDelta, editing
from kedit_train.errors import EditError


def offload(module: nn.Module, folder: Path | None) -> None:
    device = torch.device("cpu")
    if folder is None:
        cpu_offload(module, execution_device=device)
    else:
        disk_offload(module, str(folder), execution_device=device)


@pytest.mark.parametrize("disk", [False, True])
def test_a_run_with_offloaded_frozen_weights_equals_an_ordinary_run(disk: bool, tmp_path: Path) -> None:
    ordinary, net = model(), model()
    offload(net[0], tmp_path if disk else None)
    assert net[0].weight.is_meta
    callbacks = [ParameterScope(modules="1"), NormBall(1e-2)]
    train(ordinary, callbacks, sgd, 3)
    run = train(net, [ParameterScope(modules="1"), NormBall(1e-2)], sgd, 3).run
    assert run.step == 3
    assert torch.equal(net[1].weight, ordinary[1].weight)


def test_a_resumed_run_with_offloaded_frozen_weights_continues() -> None:
    net = model()
    offload(net[0], None)
    with editing(net, [ParameterScope(modules="1"), NormBall(1e-2)]) as edit:
        step(edit, net, sgd(edit.parameters()))
        state = edit.state_dict()
    assert "0.weight" not in state["checksums"]["frozen"]
    with editing(net, [ParameterScope(modules="1"), NormBall(1e-2)]) as edit:
        edit.load_state_dict(state)
        step(edit, net, sgd(edit.parameters()))
    assert edit.run.step == 2


def test_an_offloaded_module_that_is_added_during_the_run_is_an_error() -> None:
    net = model()

    def add(number: int) -> None:
        if number == 1:
            net[0].add_module("extra", nn.Linear(3, 3, device="meta").requires_grad_(False))

    with pytest.raises(EditError, match=r"^0\.extra\.weight was added to the model"):
        train(net, [ParameterScope(modules="1")], sgd, 2, add)


def test_callbacks_that_read_all_weights_are_one_line(tmp_path: Path) -> None:
    net = model()
    offload(net[0], None)
    with pytest.raises(EditError, match=r"^SaveDelta: 0\.weight is on the meta device.*without device_map") as error:
        train(net, [ParameterScope(modules="1"), SaveDelta(str(tmp_path / "edit.safetensors"))], sgd, 1)
    assert "\n" not in str(error.value)
    language_model = world.load()[0]
    offload(language_model.model.layers[0], None)
    with (
        pytest.raises(EditError, match=r"^PrefixCache: model\.layers\.0\..* is on the meta device"),
        editing(language_model, [ParameterScope(2, modules="mlp"), PrefixCache()]) as edit,
    ):
        edit.before_step()
