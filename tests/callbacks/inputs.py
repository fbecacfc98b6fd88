"""What a weight reads of some texts, and a loop that trains it: for the tests of NullSpace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 w21 w22 w23", "w7 w7 w7"]
WEIGHT = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}
SCOPE = {"llama": "mlp.down_proj.weight", "gpt2": "mlp.c_proj.weight"}


def train(model: Any, edit: Any, ids: Tensor, optimizer: Any, steps: int = 50) -> None:
    for _ in range(steps):
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def keys(model: Any, words: Any, module: str, texts: list[str] = TEXTS) -> Tensor:
    """[d_in, tokens] of what a module reads, one text at a time."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for text in texts:
            model.eval()(input_ids=torch.tensor([words(text)["input_ids"]]))
    handle.remove()
    return torch.cat(seen).double().T


def preserved(k: Tensor, energy: float) -> Tensor:
    """[d_in, r]: the fewest left singular vectors that hold the energy."""
    u, s, _ = torch.linalg.svd(k, full_matrices=False)
    rank = int(((s**2).cumsum(0) / (s**2).sum() < energy).sum()) + 1
    # Between nearly equal energies the border would be drawn by rounding.
    assert rank == len(s) or s[rank - 1] > 1.05 * s[rank]
    return u[:, :rank]
