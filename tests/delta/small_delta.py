"""A small delta with every layout, for tests."""

from __future__ import annotations

import torch

from kedit_train import EditDelta


def small(seed: int = 0) -> tuple[EditDelta, dict[str, torch.Tensor]]:
    """A delta with every layout, and the edited weights."""
    torch.manual_seed(seed)
    base = {
        "a.weight": torch.randn(4, 6),
        "b": torch.randn(5, 3).bfloat16(),
        "c": torch.randn(9),
        "d": torch.randn(6, 4),
    }
    edited = {name: value.clone() for name, value in base.items()}
    edited["a.weight"][:, 2] += 1
    edited["b"] += 1
    edited["c"][4] += 1
    edited["d"][[1, 5]] += 1
    return EditDelta.between(base, edited, scores={"edit/reliability": 0.5}), edited
