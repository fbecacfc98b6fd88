"""Compute in full precision, independently of the autocast and TF32 settings of the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Context manager: turn off autocast, and compute fp32 matrix products in fp32 instead of TF32 or bf16.

    TF32 has 10 bits of mantissa. If a projection removed a component of a tensor in TF32, about 1e-3 of the component
    would remain.

    Args:
        device_type: "cpu", "cuda", ...
    """
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(previous)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in fp32. A tensor in fp64 stays in fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def widest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in fp64. If its device has no fp64 (MPS), the result is on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
