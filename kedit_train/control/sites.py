"""The places of a language model where hidden states are recorded and controlled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kedit_train.arguments import cut
from kedit_train.core.scope.adapters import base_model
from kedit_train.core.scope.scope import find_layers
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import unwrap_model

HEAD = "head"
Layer = int | str


@dataclass(frozen=True)
class Site:
    """A tensor of hidden states, [batch, length, hidden], in the forward pass of a model.

    Args:
        name: "head", or the index of a layer as text.
        module: the module that receives or returns the hidden states.
    """

    name: str
    module: nn.Module

    def register(self, function: Callable[[Tensor], Tensor | None]) -> Any:
        """Call ``function`` with the hidden states in every forward pass, and return the handle of the hook.

        If the function returns a tensor, the tensor replaces the hidden states.
        """
        if self.name == HEAD:

            def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                changed = function(args[0])
                return None if changed is None else (changed, *args[1:])

            return self.module.register_forward_pre_hook(enter)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = function(hidden)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return self.module.register_forward_hook(leave)


def causal_model(model: nn.Module) -> Any:
    """Return the language model inside the wrappers of a trainer or of PEFT."""
    return base_model(unwrap_model(model))


def hidden_size(model: nn.Module) -> int:
    """Return the width of the hidden states."""
    return causal_model(model).config.get_text_config().hidden_size


def find_sites(model: nn.Module, layers: Sequence[Layer]) -> list[Site]:
    """Return the :class:`Site` of each given layer.

    Args:
        model: a causal language model.
        layers: "head" is the input of the output head (after the final norm). An integer, or an integer as text, is the
            output of the layer with this index; a negative index counts from the last layer.

    Raises:
        EditError: a layer does not exist or is given twice, no layer is given, or the model has no stack of layers.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise EditError(
            f'layers must be a non-empty list, got {cut(repr(layers), 60)}; pass a list, for example ["head"] or '
            "[3, 5]."
        )
    inner = causal_model(model)
    sites = []
    for layer in layers:
        if layer == HEAD:
            sites.append(Site(HEAD, inner.get_output_embeddings()))
            continue
        name, depth = find_layers(inner)
        try:
            index = -depth - 1 if isinstance(layer, bool | float) else int(layer)
        except (TypeError, ValueError):
            index = -depth - 1
        if not -depth <= index < depth:
            raise EditError(
                f'each item of layers must be "head" or an index from {-depth} to {depth - 1}, got {cut(repr(layer))}.'
            )
        sites.append(Site(str(index % depth), inner.get_submodule(name)[index]))
    names = [site.name for site in sites]
    if len(set(names)) < len(names):
        raise EditError(
            f"layers must contain each layer only once, got {cut(repr(list(layers)))}; remove the repeated layers. A "
            "negative index counts from the last layer."
        )
    return sites
