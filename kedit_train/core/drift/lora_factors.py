"""Which factors of LoRA adapters a projection of the change applies to."""

from __future__ import annotations

from collections.abc import Mapping

from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


def lora_pairs(run: EditRun, layers: Mapping[str, LinearLayer]) -> dict[str, str]:
    """Return A -> B for every LoRA pair of which both factors are in scope.

    With B = 0 at the start the adapter's change is ``B A``, so it stays in a space of inputs if A does.

    Raises:
        EditError: a B factor is not zero at the start, or an adapter is DoRA.
    """
    pairs = {name: _partner(name) for name in layers if ".lora_A." in name and _partner(name) in layers}
    for partner in pairs.values():
        if bool(run.reference[partner].any()):
            raise EditError(
                f"{partner} is not zero, so the adapter already changes the model and training both factors cannot "
                "preserve its inputs; merge it and start with a new adapter, or train one factor only."
            )
    for name, module in run.model.named_modules():
        if getattr(module, "lora_magnitude_vector", None) and any(layer.startswith(f"{name}.") for layer in layers):
            raise EditError(f"{name} is a DoRA adapter, which rescales the output for every input; use LoRA.")
    return pairs


def _partner(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")
