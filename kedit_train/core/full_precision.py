"""Train the scope of a half-precision model in fp32, in place.

The distance between two neighboring bf16 numbers near 0.1 is 5e-4. The small updates of an edit would be rounded to
nothing, and a norm ball of 5e-5 could not be represented. So the scoped parameters themselves become fp32, and with
them their gradients and the optimizer state. Every module that reads one computes with a copy in the model's dtype.
Names and parameter objects stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kedit_train.functional.precision import HALF


class FullPrecision:
    """Keep half-precision parameters in fp32 until :meth:`remove` is called.

    Args:
        root: a module that contains every owner of the parameters, also of tied ones.
        parameters: name -> parameter; the half-precision ones are changed in place (``parameter.data``).

    Attributes:
        dtypes: name -> original dtype of each parameter that was changed.
    """

    def __init__(self, root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.dtypes = {name: p.dtype for name, p in parameters.items() if p.dtype in HALF}
        self._parameters = {name: parameters[name] for name in self.dtypes}
        original = {id(p): self.dtypes[name] for name, p in self._parameters.items()}
        owned = {
            module: {name: original[id(p)] for name, p in module._parameters.items() if id(p) in original}
            for module in root.modules()
        }
        # A module around an owner may read its weight too (attention that calls F.linear; T5, which reads the dtype),
        # and gradient checkpointing may start its second forward pass at any of these modules.
        owners_in = {m: [(inner, owned[inner]) for inner in m.modules() if owned[inner]] for m in root.modules()}
        self._owners_in = {module: owners for module, owners in owners_in.items() if owners}
        # For each module call under way: the number of swapped owners when it began.
        self._stack_sizes: list[int] = []
        # (the owner's parameter dict, the fp32 parameters that were swapped out of it).
        self._swapped: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._handles: list[Any] = []
        for module in self._owners_in:
            self._handles.append(module.register_forward_pre_hook(self._before))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()

    def remove(self) -> None:
        """Convert the parameters back to their original dtypes and remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for name, parameter in self._parameters.items():
            parameter.data = parameter.data.to(self.dtypes[name])
            parameter.grad = None

    def _before(self, module: nn.Module, args: Any) -> None:
        """Put half-precision copies in the place of the fp32 parameters."""
        self._stack_sizes.append(len(self._swapped))
        for owner, dtypes in self._owners_in[module]:
            slots: dict[str, Any] = owner._parameters
            # A plain tensor there means that an outer module has put the copy in place already.
            if not isinstance(slots[next(iter(dtypes))], nn.Parameter):
                continue
            masters = {name: slots[name] for name in dtypes}
            self._swapped.append((slots, masters))
            # The same keys keep their positions, so the order of named_parameters() does not change.
            slots.update({name: master.to(dtypes[name]) for name, master in masters.items()})

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the fp32 parameters back that this call swapped out."""
        size = self._stack_sizes.pop()
        while len(self._swapped) > size:
            slots, masters = self._swapped.pop()
            slots.update(masters)
