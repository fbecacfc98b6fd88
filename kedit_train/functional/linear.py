"""A linear projection in half precision whose gradients are accumulated in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def half_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Project [N, d] to [N, V] in ``dtype`` (bf16 or fp16), as autocast would, with fp32 gradients.

    Rounding the gradient of every vocabulary slice to half precision before summing biases training; TRL's fused head
    therefore sums in fp32, and so does this, so that losses agree with TRL's beyond the first step.

    Args:
        hidden: [N, d]; weight: [V, d]; bias: [V] or None; any float dtype.
    """
    return _HalfLinear.apply(hidden, weight, bias, dtype)  # pyright: ignore[reportReturnType]


class _HalfLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype = dtype
        with torch.autocast(hidden.device.type, enabled=False):
            # One call: the bias is added before the sum is rounded, as autocast has it.
            return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        grad = grad_outputs[0].to(ctx.dtype)
        grads: list[Tensor | None] = [None, None, None, None]
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grads[0] = _matmul_fp32(grad, weight.to(ctx.dtype)).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                grads[1] = _matmul_fp32(grad.t(), hidden.to(ctx.dtype)).to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                grads[2] = grad.sum(0, dtype=torch.float32).to(bias.dtype)
        return tuple(grads)


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    # Only CUDA multiplies half-precision matrices into fp32 without converting them first.
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
