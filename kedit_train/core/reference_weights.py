"""Copy parameter values, write them back, and use other values temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kedit_train.core.checksums import checksums
from kedit_train.errors import EditError


def check_stored(tensors: Mapping[str, Tensor]) -> None:
    """Raise an error if a tensor is on the meta device, where it has no values."""
    name = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if name is not None:
        raise EditError(
            f"{name} is on the meta device, so its values cannot be read or written (possible causes: offloading, or a "
            "model without weights); load all weights into GPU or CPU memory, without device_map and offloading."
        )


def check_unchanged(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Raise an error if a parameter is not bit-identical to its copy from the start of the edit."""
    names = [name for name in values if name in parameters]
    now, copied = checksums(parameters[name] for name in names), checksums(values[name] for name in names)
    changed = next((name for name, new, old in zip(names, now, copied, strict=True) if new != old), None)
    if changed is not None:
        raise EditError(
            f"{changed} must not change between the start of the edit and the first step, because the constraints use "
            "its value at the start; load or change weights before the edit starts. To resume from a checkpoint in a "
            "plain loop, also call edit.load_state_dict()."
        )


@torch.no_grad()
def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return a copy of every parameter, on the same device and in the same dtype."""
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Write ``values`` into the parameters in place, bit for bit."""
    for name, value in values.items():
        parameters[name].copy_(value)


@contextmanager
def temporary_values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: write ``values`` into the parameters, and restore the previous values at the end.

    The previous values are restored bit for bit.
    """
    own = snapshot({name: parameters[name] for name in values})
    write(parameters, values)
    try:
        yield
    finally:
        write(parameters, own)
