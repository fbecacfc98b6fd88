"""A linear projection whose gradients are summed in fp32 over all chunks of tokens.

If the gradient of each chunk were rounded to half precision before the sum, training would be biased. TRL's fused head
also sums in fp32. A half-precision sum would therefore give other weights than TRL, already after the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional.precision import HALF

# Vocabulary rows per matrix product. A product over all rows would need a second matrix as large as the output head.
_BLOCK = 2**14


class GradientSums:
    """Sums of the gradients of given tensors over several backward passes, in fp32 (fp64 for fp64 tensors).

    The gradient of an output head is as large as the head, so only one such gradient should be in memory. Call
    :func:`linear` inside :meth:`collecting`. Its backward pass then adds the gradient of its weight to the sum in
    place. Pass all other gradients to :meth:`add`.

    Args:
        tensors: the trained tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._places = {id(tensor): place for place, tensor in enumerate(self.tensors)}
        self._sums: list[Tensor | None] = [None] * len(self.tensors)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect gradients in a ``with`` block.

        The backward pass of each :func:`linear` that is called in the block adds the gradient of its weight to the sum
        for this weight.
        """
        token = _COLLECTING.set(self)
        try:
            yield
        finally:
            _COLLECTING.reset(token)

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the gradient sum of a tensor, or None if the tensor is not one of ``tensors``.

        Before a gradient is added, the sum is zero.
        """
        place = self._places.get(id(tensor))
        return None if place is None else self._sum(place)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one gradient per tensor, in the order of ``tensors``. Where a gradient is ``None``, nothing is added."""
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                self._sum(place).add_(gradient)

    def scale(self, factor: Tensor) -> None:
        """Multiply every sum by a scalar."""
        for total in self._sums:
            if total is not None:
                total.mul_(factor)

    def take(self) -> list[Tensor | None]:
        """Return one sum per tensor, in the dtype of the tensor, and clear the sums.

        A sum is None if no gradient was added to it.
        """
        sums = self._sums
        self._sums = [None] * len(self.tensors)
        return [None if s is None else s.to(t.dtype) for s, t in zip(sums, self.tensors, strict=True)]

    def _sum(self, place: int) -> Tensor:
        total = self._sums[place]
        if total is None:
            tensor = self.tensors[place]
            total = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            self._sums[place] = total
        return total


_COLLECTING: ContextVar[GradientSums | None] = ContextVar("collecting", default=None)


def linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, fp32_gradients: bool = True
) -> Tensor:
    """Project hidden states to logits in ``dtype``, as autocast does.

    Inside :meth:`GradientSums.collecting`, the weight gradients of all calls are summed in fp32 (in fp64 for fp64
    tensors).

    Args:
        hidden: [N, d], any float dtype.
        weight: [V, d], any float dtype.
        bias: [V], or None.
        dtype: dtype of the product and of the result.
        fp32_gradients: how to round the matrix products of the backward pass if ``dtype`` is a half-precision dtype.
            True keeps the products in fp32, as TRL's fused head does. False rounds each product to ``dtype``, as
            autocast does.

    Returns:
        [N, V] in ``dtype``.

    Raises:
        ValueError: the call is inside :meth:`GradientSums.collecting`, and ``weight`` is trained but is not one of the
            ``tensors`` of :class:`GradientSums`.
    """
    return _Linear.apply(hidden, weight, bias, dtype, fp32_gradients)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, fp32_gradients: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype, ctx.widen = dtype, fp32_gradients and dtype in HALF
        # The context variable is read here. On a GPU, the backward pass runs in another thread, which does not have it.
        sums = _COLLECTING.get()
        ctx.weight_sum = None if sums is None or not ctx.needs_input_grad[1] else sums.of(weight)
        if sums is not None and ctx.needs_input_grad[1] and ctx.weight_sum is None:
            raise ValueError(
                "a trained weight of the projection is missing in chunked(parameters=...); add this weight to "
                "parameters."
            )
        with torch.autocast(hidden.device.type, enabled=False):
            # A single call adds the bias before the product is rounded, as under autocast.
            return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        grad = grad_outputs[0].to(ctx.dtype)
        grads: list[Tensor | None] = [None, None, None, None, None]
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grads[0] = _to_hidden(grad, weight, ctx.dtype, ctx.widen).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                total = ctx.weight_sum
                if total is None:
                    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
                    grads[1] = total
                _add_to_weight(total, grad, hidden.to(ctx.dtype), ctx.widen)
                grads[1] = None if grads[1] is None else total.to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                grads[2] = grad.sum(0, dtype=torch.promote_types(ctx.dtype, torch.float32)).to(bias.dtype)
        return tuple(grads)


def _to_hidden(grad: Tensor, weight: Tensor, dtype: torch.dtype, widen: bool) -> Tensor:
    """Return the gradient of the hidden states, ``grad @ weight`` [n, d]. The weight is first rounded to ``dtype``."""
    if not widen:
        return grad @ weight.to(dtype)
    # On CUDA, torch can multiply half-precision matrices and return the product in fp32. On other devices, the matrices
    # are converted to fp32 first.
    if grad.is_cuda:
        return torch.mm(grad, weight.to(dtype), out_dtype=torch.float32)
    total = torch.zeros(len(grad), weight.shape[1], device=grad.device)
    for columns, rows in zip(grad.split(_BLOCK, 1), weight.split(_BLOCK), strict=True):
        total.addmm_(columns.float(), rows.to(dtype).float())
    return total


def _add_to_weight(total: Tensor, grad: Tensor, hidden: Tensor, widen: bool) -> None:
    """Add ``grad.T @ hidden`` [V, d] to ``total`` without a second tensor of this size."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), hidden)
        return
    for rows, columns in zip(total.split(_BLOCK), grad.split(_BLOCK, 1), strict=True):
        if not widen:
            rows += columns.t() @ hidden
        elif grad.is_cuda:
            rows += torch.mm(columns.t(), hidden, out_dtype=torch.float32)
        else:
            rows.addmm_(columns.t().float(), hidden.float())
