"""Matrix products at the full precision of their operands, whatever the surrounding loop prefers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within, neither autocast nor reduced-precision fp32 products (TF32, bf16) on this kind of device.

    TF32 keeps 10 bits of mantissa: a projection made with it leaks about 1e-3 of what it is to remove.
    """
    own = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(own)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in at least fp32: half precision is widened, fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def widest(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp64, on the CPU where its device has none (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
