"""Combine the weight changes of single tensors into one norm per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """The change of the weights of one layer.

    Args:
        layer: index of the layer. None for tensors that belong to no layer, such as the embedding.
        tensors: number of changed tensors.
        change: Frobenius norm of the change of all these tensors together.
        relative: ``change`` divided by the norm of these tensors before the change. None if this norm is unknown.
    """

    layer: int | None
    tensors: int
    change: float
    relative: float | None

    @property
    def label(self) -> str:
        """The text that names the layer."""
        return "no layer" if self.layer is None else f"layer {self.layer}"


def layer_of(name: str) -> int | None:
    """Return the layer of a tensor: the first number in its dotted name. None if there is no number.

    Example:
        >>> layer_of("model.layers.12.mlp.down_proj.weight"), layer_of("lm_head.weight")
        (12, None)
    """
    number = re.search(r"\.(\d+)\.", name)
    return None if number is None else int(number[1])


def drift_by_layer(norms: Mapping[str, Mapping[str, Any]]) -> list[LayerDrift]:
    """Combine the norms of tensors into one value per layer, sorted by layer. Tensors without a layer come first.

    Args:
        norms: for each tensor name, a dict with two norms: "change" is the norm of the change, and "before" is the norm
            of the tensor before the change, or None if it is unknown.

    Example:
        >>> norms = {"h.0.a": {"change": 3.0, "before": 6.0}, "h.0.b": {"change": 4.0, "before": 8.0}}
        >>> drift_by_layer(norms)
        [LayerDrift(layer=0, tensors=2, change=5.0, relative=0.5)]
    """
    layers: dict[int | None, list[Mapping[str, Any]]] = {}
    for name, values in norms.items():
        layers.setdefault(layer_of(name), []).append(values)
    rows = []
    for layer in sorted(layers, key=lambda index: -1 if index is None else index):
        group = layers[layer]
        change = sum(values["change"] ** 2 for values in group) ** 0.5
        known = [values["before"] for values in group if values.get("before") is not None]
        before = sum(value**2 for value in known) ** 0.5
        relative = change / before if len(known) == len(group) and before else None
        rows.append(LayerDrift(layer=layer, tensors=len(group), change=change, relative=relative))
    return rows
