"""Projection of gradients and of the whole change, with a projection that is known exactly."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kedit_train.core.drift.change_projection import ChangeProjection
from kedit_train.core.drift.gradient_projection import project_gradients
from kedit_train.core.drift.linear_layers import find_linear_layers
from kedit_train.errors import EditError


class Columns(NamedTuple):
    """Input directions along the axes: True for those that are removed."""

    removed: Tensor


FIRST_INPUT = Columns(torch.tensor([True, False, False]))


def remove_columns(change: Tensor, columns: Columns) -> Tensor:
    return change.masked_fill(columns.removed, 0.0)


def projection_of(layer: nn.Module) -> ChangeProjection:
    layers = find_linear_layers(layer, {"weight": layer.weight})
    return ChangeProjection(layers, {"weight": FIRST_INPUT}, remove_columns)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), Conv1D(2, 3)], ids=["Linear", "Conv1D"])
def test_gradients_are_projected_as_out_by_in_also_when_they_accumulate(layer):
    layers = find_linear_layers(layer, {"weight": layer.weight})
    inputs = torch.tensor([[1.0, 2.0, 3.0]])
    (hook,) = project_gradients(layers, {"weight": layer.weight}, lambda _, g: remove_columns(g, FIRST_INPUT))
    for times in (1, 2):
        layer(inputs).sum().backward()
        gradient = layers["weight"].as_matrix(layer.weight.grad)
        assert torch.equal(gradient, times * torch.tensor([[0.0, 2.0, 3.0]] * 2))
    hook.remove()
    layer.zero_grad()
    layer(inputs).sum().backward()
    assert torch.equal(layers["weight"].as_matrix(layer.weight.grad), inputs.expand(2, 3))


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), Conv1D(2, 3)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_loses_its_part_in_the_removed_directions(layer, dtype):
    layer = layer.to(dtype)
    projection = projection_of(layer)
    reference = {"weight": torch.zeros_like(layer.weight)}
    weights = {"weight": torch.ones_like(layer.weight), "other": torch.ones(1)}
    constrained = projection.constrain(weights, reference)
    matrix = projection.layers["weight"].as_matrix(constrained["weight"])
    assert torch.equal(matrix, torch.tensor([[0, 1, 1]] * 2, dtype=dtype))
    assert constrained["other"] is weights["other"]
    assert torch.equal(weights["weight"], torch.ones_like(layer.weight))
    assert projection.leak(weights, reference) == pytest.approx((1 / 3) ** 0.5)
    assert projection.leak(constrained, reference) == 0.0
    assert projection.leak(reference, reference) is None


def test_stop_removes_the_gradient_hooks_and_the_directions():
    layer = nn.Linear(3, 2)
    projection = projection_of(layer)
    projection.start({"weight": layer.weight})
    projection.stop()
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))
    changed = {"weight": torch.ones(2, 3)}
    assert projection.constrain(changed, {"weight": torch.zeros(2, 3)})["weight"] is changed["weight"]


def test_a_checkpoint_restores_the_directions_of_the_same_scope():
    saved, resumed = projection_of(nn.Linear(3, 2)), projection_of(nn.Linear(3, 2))
    saved.subspaces["weight"] = Columns(torch.tensor([False, True, False]))
    resumed.load_state(saved.state())
    assert torch.equal(resumed.subspaces["weight"].removed, saved.subspaces["weight"].removed)
    with pytest.raises(EditError, match="the checkpoint was written with another scope"):
        resumed.load_state({})
