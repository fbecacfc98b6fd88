"""Comparison of model states as bytes, independent of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DOWN = "model.layers.1.mlp.down_proj.weight"


def integers(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, in another way than the package does."""
    return torch.frombuffer(
        bytearray(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()), dtype=torch.uint8
    )


def equal_bits(one: Any, other: Any) -> bool:
    """Return whether two state dicts have the same names, dtypes, shapes and bytes."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and torch.equal(integers(one[n]), integers(other[n]))
        for n in one
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
