"""Find the model inside a PEFT model, and keep frozen parameters frozen when PEFT switches adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def base_model(model: Any) -> Any:
    """Return the model inside a PEFT model. Any other model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def keep_frozen(model: nn.Module, frozen: Iterable[nn.Parameter]) -> list[Any]:
    """Register hooks that freeze adapter parameters again before each forward pass of their layer.

    When PEFT switches adapters (``set_adapter``, ``disable_adapter``), it makes every parameter of an adapter
    trainable. Preference trainers switch adapters to run their reference model. Without the hooks, gradient clipping
    would include the gradients of parameters that should be frozen, and the graph that activation checkpointing
    recomputes would differ from the original graph.

    Args:
        model: any model. A model without PEFT adapters gets no hooks.
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
        # The hook is on the layer, because the submodules that hold DoRA magnitudes or embedding factors are never
        # called.
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
        # A copied or pickled model contains copies of the hooks. These copies must do nothing.
        return {"_names": []}
