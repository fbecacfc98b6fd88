"""Backup and restoration of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kedit_train.errors import EditError
from kedit_train.modes.weight_backup import WeightBackup


def test_values_flags_and_gradients_are_restored():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    model[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backup = WeightBackup(model)
    model.train()
    model[0].bias.requires_grad_(True)
    model(torch.randn(4, 2)).sum().backward()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    backup.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert not model[0].bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_added_parameter_cannot_be_restored():
    model = nn.Linear(2, 3)
    backup = WeightBackup(model)
    model.adapter = nn.Parameter(torch.zeros(1))
    with pytest.raises(EditError, match="but training added the tensor 'adapter'"):
        backup.restore()
