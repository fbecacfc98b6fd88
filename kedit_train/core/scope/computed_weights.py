"""Find weights that torch computes from other parameters (with weight norm, spectral norm or pruning)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

# The older functions in torch.nn.utils compute a weight from parameters whose names have these endings.
_ENDINGS = ("_g", "_v", "_orig")


@dataclass(frozen=True)
class ComputedWeight:
    """A weight that is not a parameter, because torch computes it from other parameters.

    Attributes:
        name: the name that the weight would have as a parameter.
        module: the name of its module.
        source: the name of the method that computes the weight, for example "weight_norm".
        originals: the parameters from which the weight is computed, by name.
        remedy: the call that makes the weight a parameter again.
    """

    name: str
    module: str
    source: str
    originals: dict[str, nn.Parameter]
    remedy: str


def computed_weights(model: nn.Module) -> Iterator[ComputedWeight]:
    """Find the weights of a model that torch computes from other parameters in each forward pass."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            for weight, steps in module.parametrizations.items():  # type: ignore[operator, union-attr]
                inner = f"{prefix}parametrizations.{weight}."
                originals = {f"{inner}{name}": p for name, p in steps._parameters.items() if p is not None}
                source = ", ".join(type(step).__name__.lstrip("_") for step in steps)
                remedy = f"torch.nn.utils.parametrize.remove_parametrizations(module, {weight!r})"
                yield ComputedWeight(f"{prefix}{weight}", path, source, originals, remedy)
        own = module._parameters
        for weight in dict.fromkeys(name.rpartition("_")[0] for name in own if name.endswith(_ENDINGS)):
            # A parameter may have such a name by chance. A computed weight is also a plain attribute of the module.
            if isinstance(module.__dict__.get(weight), Tensor):
                names = [f"{weight}{ending}" for ending in _ENDINGS]
                originals = {f"{prefix}{name}": p for name in names if (p := own.get(name)) is not None}
                source, remedy = _old_style(module, weight)
                yield ComputedWeight(f"{prefix}{weight}", path, source, originals, remedy)


def _old_style(module: nn.Module, weight: str) -> tuple[str, str]:
    """Return the ``source`` and the ``remedy`` of a weight that a hook computes."""
    if f"{weight}_orig" not in module._parameters:
        return "weight_norm", f"torch.nn.utils.remove_weight_norm(module, {weight!r})"
    if f"{weight}_mask" in module._buffers:
        return "prune", f"torch.nn.utils.prune.remove(module, {weight!r})"
    return "spectral_norm", f"torch.nn.utils.remove_spectral_norm(module, {weight!r})"
