"""Check that the scales of PEFT adapters are those of a checkpoint. The saved weights do not contain the scales."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from kedit_train.errors import EditError


def adapter_scales(model: nn.Module) -> dict[str, float]:
    """Return the factors that multiply the outputs of the PEFT adapters, one per layer and adapter.

    For LoRA, the factor is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.

    Args:
        model: any model.

    Returns:
        A dict from "LAYER.ADAPTER" (module name and adapter name) to the factor. Empty for a model without adapters.
    """
    scales: dict[str, float] = {}
    for name, module in model.named_modules():
        # In adapter layers, ``scaling`` is a dict. In other modules, such as attention, ``scaling`` is a number.
        scaling = getattr(module, "scaling", None)
        for adapter, value in scaling.items() if isinstance(scaling, dict) else ():
            if isinstance(value, int | float):
                scales[f"{name}.{adapter}"] = float(value)
    return scales


def check_adapter_scales(model: nn.Module, saved: Mapping[str, float]) -> None:
    """Raise an error if an adapter of the model has another scale than in the checkpoint.

    Args:
        model: the model of the run that resumes.
        saved: the result of :func:`adapter_scales` from the checkpoint.

    Raises:
        EditError: a scale differs. With another scale, the saved adapter weights would have a stronger or weaker effect
            than in the interrupted run.
    """
    current = adapter_scales(model)
    for name, value in saved.items():
        if name in current and current[name] != value:
            raise EditError(
                f"the adapter {name} multiplies its output by {value:g} in the checkpoint, but by {current[name]:g} in "
                "this run (for LoRA, the factor is lora_alpha / r); resume with the same lora_alpha, r and use_rslora."
            )
