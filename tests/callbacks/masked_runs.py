"""Edits, a training loop and a view of bits, for the tests of GradientMask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kedit_train.data import Edit

EDITS = [
    Edit("w1 w2 w3", "w4", rephrases=("w20 w21",)),
    Edit("w5 w6", "w7 w8"),
    Edit("w9 w10 w11 w12", "w13"),
]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """View numbers as integers: 0.0 and -0.0 differ, NaN equals itself."""
    return tensor.detach().view(INTEGERS[tensor.element_size()])


def train(model: Any, edit: Any, optimizer: Any, ids: Tensor, check: Callable[[], None], steps: int = 4) -> None:
    for _ in range(steps):
        edit.before_step()
        for row in ids:
            (model(input_ids=row[None], labels=row[None]).loss / len(ids)).backward()
        optimizer.step()
        check()
        optimizer.zero_grad()
