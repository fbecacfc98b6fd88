"""Factors of adapters that an edit has frozen stay frozen, whatever their adapter is switched to and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def keep_frozen(model: nn.Module, frozen: Iterable[nn.Parameter]) -> list[Any]:
    """Freeze parameters of adapters again before each forward pass of the layer that has them.

    Switching adapters (PEFT's ``set_adapter`` and ``disable_adapter``, with which trainers of preferences reach their
    reference model) makes every factor of the active adapter trainable. Gradients that no optimizer uses would then
    count in the clipping of the others, and activation checkpointing would compute another graph than it did at first.

    Args:
        model: nothing is done unless it has adapters of PEFT.
        frozen: parameters, those of adapters among them.

    Returns:
        Handles of the hooks, each with ``remove()``.
    """
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    held = {id(p) for p in frozen}
    handles: list[Any] = []
    for module in model.modules():
        # The layer, not the factor's own module: magnitudes and embeddings' factors are never called themselves.
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
            names = [name for name, p in module.named_parameters() if id(p) in held]
            if names:
                # Also when the layer is computed again in the backward pass.
                handles.append(module.register_forward_pre_hook(_Freeze(names)))
    return handles


class _Freeze:
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __call__(self, module: nn.Module, args: Any) -> None:
        for name in self._names:
            module.get_parameter(name).requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model takes its hooks along; there they do nothing.
        return {"_names": []}
