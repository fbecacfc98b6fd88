"""A small forecaster, its windows and a training loop, for the tests of OutputAnchor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from kedit_train.callbacks import editing

WINDOW, HORIZON, QUANTILES = 6, 3, 5


class Forecaster(nn.Module):
    """Returns forecasts with dropout, as a tensor or in an object."""

    def __init__(self, output: str = "tensor", outputs: int = HORIZON) -> None:
        super().__init__()
        self.hidden, self.dropout, self.head = nn.Linear(WINDOW, 8), nn.Dropout(0.5), nn.Linear(8, outputs)
        self.output, self.horizon = output, outputs

    def forward(self, windows: Tensor, targets: Tensor | None = None) -> Any:
        forecast = self.head(self.dropout(torch.tanh(self.hidden(windows))))[:, : self.horizon]
        if self.output == "tensor":
            return forecast
        if self.output == "tuple":
            return torch.zeros(()), forecast
        loss = None if targets is None else (forecast - targets).square().mean()
        return ModelOutput(loss=torch.zeros(()) if loss is None else loss, forecast=forecast)


def made(seed: int = 0, **options: Any) -> Forecaster:
    torch.manual_seed(seed)
    return Forecaster(**options)


def windows(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, WINDOW, generator=torch.Generator().manual_seed(seed))


KEPT = list(windows(20, seed=2).split(4))
NEW = windows(8), torch.randn(8, HORIZON, generator=torch.Generator().manual_seed(3))


def descend(model: nn.Module, callbacks: list[Any], steps: int, *, state: Any = None, rate: float = 0.1) -> Any:
    """Train on the new windows in a plain loop; return the logged rows and the state of the edit."""
    with editing(model, callbacks, log_every_n_steps=1) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=rate)
        if state is not None:
            edit.load_state_dict(state)
        model.eval()
        for _ in range(steps):
            optimizer.zero_grad()
            edit.before_step()
            (model(NEW[0]) - NEW[1]).square().mean().backward()
            optimizer.step()
        return edit.history, edit.state_dict()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert [n for n in first if not torch.equal(first[n].view(torch.int32), second[n].view(torch.int32))] == []
