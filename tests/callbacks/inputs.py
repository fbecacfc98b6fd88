"""Helpers for the tests of NullSpace and LowCurvature: a training loop, and the inputs of a weight on some texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_train.callbacks import ParameterScope, editing
from kedit_train.data import Edit

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 w21 w22 w23", "w7 w7 w7"]
WEIGHT = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}
SCOPE = {"llama": "mlp.down_proj.weight", "gpt2": "mlp.c_proj.weight"}


class ScopeOfEdits(ParameterScope):
    """A scope that also tells the run its edits, as EditMetrics and data modules do."""

    def __init__(self, edits: list[Edit]) -> None:
        super().__init__(1, modules=SCOPE["llama"])
        self.edits = edits

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        run.edits = self.edits


def train(model: Any, edit: Any, ids: Tensor, optimizer: Any, steps: int = 50) -> None:
    for _ in range(steps):
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_with_scaler(
    model: Any, edit: Any, ids: Tensor, scaler: Any, *, fused: bool, factors: Sequence[float] = (1.0, 1.0, 1.0)
) -> None:
    """Take one step of Adam per factor. The loss of a step is multiplied by its factor."""
    optimizer = torch.optim.Adam(edit.parameters(), lr=1e-3, fused=fused)
    for factor in factors:
        optimizer.zero_grad()
        edit.before_step(scaler)
        scaler.scale(model(input_ids=ids, labels=ids).loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def attach(model: Any, words: Any, *callbacks: Any) -> None:
    """Let the callbacks attach to the model, without training it."""
    with editing(model, list(callbacks), tokenizer=words) as edit:
        edit.before_step()


def inputs_of(model: Any, words: Any, weight: str, texts: list[str] = TEXTS) -> Tensor:
    """Return the inputs that a weight is multiplied by, [d_in, tokens], reading one text at a time."""
    inputs: list[Tensor] = []
    module = model.get_submodule(weight.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for text in texts:
            model.eval()(input_ids=torch.tensor([words(text)["input_ids"]]))
    handle.remove()
    return torch.cat(inputs).double().T


def principal(inputs: Tensor, energy: float) -> Tensor:
    """Return the fewest left singular vectors that hold this share of the energy, [d_in, rank]."""
    u, s, _ = torch.linalg.svd(inputs, full_matrices=False)
    rank = int(((s**2).cumsum(0) / (s**2).sum() < energy).sum()) + 1
    # With nearly equal energies at the limit, rounding would decide the rank.
    assert rank == len(s) or s[rank - 1] > 1.05 * s[rank]
    return u[:, :rank]


def share_of(change: Tensor, directions: Tensor) -> float:
    """Return the norm of the part of the change in these directions, divided by the norm of the whole change."""
    return float((change @ directions).norm() / change.norm())
