"""Keep the factors of adapters frozen that an edit has frozen, even when PEFT switches adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def keep_frozen(model: nn.Module, frozen: Iterable[nn.Parameter]) -> list[Any]:
    """Freeze parameters of adapters again before each forward pass of their layer.

    Switching adapters makes every factor of the active adapter trainable (``set_adapter`` and ``disable_adapter`` of
    PEFT, which preference trainers use for their reference model). Gradients without an optimizer would then count in
    gradient clipping, and activation checkpointing would recompute another graph than the first one.

    Args:
        model: nothing happens unless it has PEFT adapters.
        frozen: frozen parameters of the model, including those of adapters.

    Returns:
        Handles of hooks, each with ``remove()``.
    """
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    frozen_ids = {id(p) for p in frozen}
    handles: list[Any] = []
    for module in model.modules():
        # The hook is on the layer, because modules of magnitudes and embedding factors are never called themselves.
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
            names = [name for name, p in module.named_parameters() if id(p) in frozen_ids]
            if names:
                # The hook also runs when the backward pass recomputes the layer.
                handles.append(module.register_forward_pre_hook(_Freeze(names)))
    return handles


class _Freeze:
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __call__(self, module: nn.Module, args: Any) -> None:
        for name in self._names:
            module.get_parameter(name).requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model takes its hooks along. The copies do nothing.
        return {"_names": []}
