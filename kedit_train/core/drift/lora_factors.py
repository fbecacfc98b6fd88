"""Find the LoRA factors to which a projection of the weight change applies."""

from __future__ import annotations

from collections.abc import Mapping

from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


def lora_pairs(run: EditRun, layers: Mapping[str, LinearLayer]) -> dict[str, str]:
    """Return name of A -> name of B for every LoRA adapter with both factors in the scope.

    If B is zero at the start, the adapter changes the weight by ``B A``. If the rows of A stay in a space of inputs,
    the rows of this change stay in the same space.

    Raises:
        EditError: a B factor is not zero at the start, or an adapter is DoRA.
    """
    pairs = {name: _partner(name) for name in layers if ".lora_A." in name and _partner(name) in layers}
    for partner in pairs.values():
        if bool(run.reference[partner].any()):
            raise EditError(
                f"{partner} is not zero, so the adapter already changes the model. Training both LoRA factors would "
                "not preserve outputs; merge the adapter and add a new adapter, or train only one factor."
            )
    for name, module in run.model.named_modules():
        if getattr(module, "lora_magnitude_vector", None) and any(layer.startswith(f"{name}.") for layer in layers):
            raise EditError(f"{name} is a DoRA adapter, which rescales the output for every input; use a LoRA adapter.")
    return pairs


def _partner(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")
