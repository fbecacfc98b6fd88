"""The layout of a change: the smallest one, without large temporary tensors."""

from __future__ import annotations

import pytest
import torch

from kedit_train.delta import tensor_change
from kedit_train.delta.tensor_change import change_between


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("changed", [0.0, 0.1, 0.3, 0.45, 0.55, 0.62, 0.7, 0.85, 1.0])
def test_the_smallest_layout_is_chosen(dtype, changed, monkeypatch):
    """An index of all entries is made only if it can be used."""
    base = torch.randn(40, 30).to(dtype)
    moved = torch.rand(40, 30) < changed
    moved[0, :], moved[:, 0] = True, True
    made = []
    own = tensor_change._numbers
    monkeypatch.setattr(tensor_change, "_numbers", lambda mask: made.append(len(mask)) or own(mask))
    change = change_between(base, torch.where(moved, base + 1, base), "")
    size, count = base.element_size(), int(moved.sum())
    entries, dense = count * (2 * size + 4), 2 * size * base.numel()
    assert change.layout == ("entries" if entries < dense else "dense")
    assert change.nbytes == min(entries, dense)
    assert (base.numel() in made) == (entries < dense)
