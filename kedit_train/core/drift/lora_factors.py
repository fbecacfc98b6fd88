"""Find LoRA adapters for which a projection of the weight change needs to project only the A factor."""

from __future__ import annotations

from collections.abc import Mapping

from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.drift.shards import total
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


def lora_pairs(run: EditRun, layers: Mapping[str, LinearLayer]) -> dict[str, str]:
    """Find the LoRA adapters whose two factors A and B are both in the scope.

    In such an adapter, B must be zero at the start, so that training changes the weight by ``B A``. Each row of ``B A``
    is a linear combination of the rows of A. To keep the rows of the weight change in a subspace, it is therefore
    enough to keep the rows of A in this subspace.

    Returns:
        A dict from the name of each A factor to the name of its B factor.

    Raises:
        EditError: a B factor is not zero at the start, or an adapter is DoRA.
    """
    pairs = {name: _partner(name) for name in layers if ".lora_A." in name and _partner(name) in layers}
    for partner in pairs.values():
        if total([run.reference[partner] != 0]):
            raise EditError(
                f"{partner} is not zero, so the adapter already changes the model. Training both factors of this LoRA "
                "adapter would not preserve the outputs; merge the adapter and add a new adapter, or train only one "
                "factor."
            )
    for name, module in run.model.named_modules():
        if getattr(module, "lora_magnitude_vector", None) and any(layer.startswith(f"{name}.") for layer in layers):
            raise EditError(
                f"{name} is a DoRA adapter, which rescales the output for every input, so outputs would not be "
                "preserved; use a LoRA adapter."
            )
    return pairs


def _partner(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")
