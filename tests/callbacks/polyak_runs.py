"""Callbacks and training steps for the tests of PolyakStep."""

from __future__ import annotations

from typing import Any

import torch
from callbacks.inputs import SCOPE
from torch import Tensor

from kedit_train.callbacks import ParameterScope, TokenLoss, editing

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=100.0, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0),
}


def callbacks(*more: Any, modules: Any = SCOPE["llama"], layers: Any = 1) -> list[Any]:
    return [ParameterScope(layers, modules=modules), TokenLoss("cross_entropy"), *more]


def run_steps(
    model: Any,
    words: Any,
    ids: Tensor,
    *more: Any,
    modules: Any = SCOPE["llama"],
    layers: Any = 1,
    optimizer: str = "adamw",
    steps: int = 3,
    state: Any = None,
) -> tuple[list[float], list[dict[str, Tensor]], Any]:
    """Return the loss and the gradients of each step, and the state of the run after its last step."""
    losses, gradients = [], []
    with editing(model, callbacks(*more, modules=modules, layers=layers), tokenizer=words) as edit:
        chosen = OPTIMIZERS[optimizer](edit.parameters())
        if state is not None:
            edit.load_state_dict(state)
        for _ in range(steps):
            edit.before_step()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append({n: p.grad.detach().double() for n, p in model.named_parameters() if p.grad is not None})
            chosen.step()
            chosen.zero_grad()
        saved = edit.state_dict()
    return losses, gradients, saved
