"""The projection in half precision has the values of autocast and gradients summed in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional.chunked_linear import linear
from kedit_train.functional.precision import HALF


def data(bias: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(seed)
    return torch.randn(37, 64), torch.randn(211, 64), torch.randn(211) if bias else None


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_autocast(dtype, bias):
    for seed in range(5):
        hidden, weight, b = data(bias, seed)
        with torch.autocast("cpu", dtype=dtype):
            want = F.linear(hidden, weight, b)
        got = linear(hidden, weight, b, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", HALF)
def test_surrounding_autocast_changes_nothing(dtype):
    hidden, weight, bias = data(True)
    want = linear(hidden, weight, bias, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(hidden, weight, bias, dtype), want)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("stored", [torch.float32, "half"])
def test_gradients_are_summed_in_fp32(dtype, stored):
    hidden, weight, bias = data(True)
    stored = dtype if stored == "half" else stored
    leaves = [t.to(stored).requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = linear(*leaves, dtype)
    upstream = torch.randn(logits.shape)
    logits.float().backward(upstream)
    # The reference: operands rounded to half precision, products and sums exact.
    g, h, w = upstream.to(dtype).double(), leaves[0].detach().to(dtype).double(), leaves[1].detach().to(dtype).double()
    for leaf, want in zip(leaves, (g @ w, g.t() @ h, g.sum(0)), strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == stored
        error = (leaf.grad.double() - want).norm() / want.norm()
        assert error < (1e-6 if stored == torch.float32 else torch.finfo(dtype).eps)


def test_only_trained_tensors_get_a_gradient():
    hidden, weight, bias = data(True)
    linear(hidden.requires_grad_(), weight, bias, torch.bfloat16).float().sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert bias is not None
    assert bias.grad is None
