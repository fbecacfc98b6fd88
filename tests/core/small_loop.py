"""A tiny model and a plain training loop, for tests of single steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kedit_train.callbacks import EditCallback, editing


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 3))


def step(edit: Any, net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    edit.before_step()
    net(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def train(net: nn.Module, callbacks: list[Any], make: Any, steps: int, before: Any = lambda number: None) -> Any:
    """Train for ``steps`` steps, and call ``before(number)`` before each step."""
    with editing(net, callbacks) as edit:
        optimizer = make(edit.parameters())
        for number in range(steps):
            before(number)
            step(edit, net, optimizer)
    return edit


class Penalty(EditCallback):
    """Add the sum of the squares of all weights in scope to the loss."""

    penalizes = True

    def penalty(self, run: Any) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in run.scope.values()]).sum()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
