"""Pair the A and B factors of LoRA adapters. ``NullSpace`` projects only the A factor of each pair."""

from __future__ import annotations

from collections.abc import Mapping

from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.drift.shards import total
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


def lora_pairs(run: EditRun, layers: Mapping[str, LinearLayer]) -> dict[str, str]:
    """Find the LoRA adapters whose two factors A and B are both in the scope.

    Such an adapter changes the weight by ``B A``, because B is zero at the start. Each row of ``B A`` is a linear
    combination of the rows of A. If all rows of A stay in a subspace, the rows of the weight change stay in it too.

    Returns:
        A dict from the name of each A factor to the name of its B factor.

    Raises:
        EditError: a B factor is not zero at the start, or an adapter is DoRA.
    """
    pairs = {name: _partner(name) for name in layers if ".lora_A." in name and _partner(name) in layers}
    for partner in pairs.values():
        if total([run.reference[partner] != 0]):
            raise EditError(
                f"{partner} is not zero, so the adapter already changes the model. NullSpace cannot train both "
                "factors of such an adapter; merge the adapter and add a new adapter, or train only one factor."
            )
    for name, module in run.model.named_modules():
        if getattr(module, "lora_magnitude_vector", None) and any(layer.startswith(f"{name}.") for layer in layers):
            raise EditError(
                f"{name} is a DoRA adapter, which rescales the output for every input, so NullSpace cannot "
                "preserve outputs; use a LoRA adapter."
            )
    return pairs


def _partner(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")
