"""Train a half-precision model's scope in fp32, in place: same parameters, same names, half precision again at the end.

A bf16 number near 0.1 has neighbours 5e-4 away, so an edit's small updates are rounded to nothing and a ball of 5e-5
cannot be represented. Here the scoped parameters themselves become fp32 (the optimizer, its state and their gradients
with them), and every module that reads one computes with a copy in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kedit_train.functional.precision import HALF


class FullPrecision:
    """Holds the half-precision ones of ``parameters`` in fp32 until :meth:`remove`.

    Args:
        root: the module in which every owner of the parameters is found, tied ones included.
        parameters: name -> parameter, changed in place (``parameter.data``).
    """

    def __init__(self, root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.dtypes = {name: p.dtype for name, p in parameters.items() if p.dtype in HALF}
        self._parameters = {name: parameters[name] for name in self.dtypes}
        stored = {id(p): self.dtypes[name] for name, p in self._parameters.items()}
        owners = {
            module: {name: stored[id(p)] for name, p in module._parameters.items() if id(p) in stored}
            for module in root.modules()
        }
        # Modules around an owner read its weight as well (attention that calls F.linear, T5, which asks for its dtype),
        # and each may be where checkpointing computes again.
        inside = {m: [(inner, owners[inner]) for inner in m.modules() if owners[inner]] for m in root.modules()}
        self._inside = {module: found for module, found in inside.items() if found}
        self._outermost: list[int] = []
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._handles: list[Any] = []
        for module in self._inside:
            self._handles.append(module.register_forward_pre_hook(self._before))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()

    def remove(self) -> None:
        """Round the parameters to the dtype that they had and leave the modules as they were."""
        for handle in self._handles:
            handle.remove()
        for name, parameter in self._parameters.items():
            parameter.data = parameter.data.to(self.dtypes[name])
            parameter.grad = None

    def _before(self, module: nn.Module, args: Any) -> None:
        self._outermost.append(len(self._held))
        for owner, dtypes in self._inside[module]:
            # A plain tensor will do in a parameter's slot; it is already there where an outer module has put it.
            slots: dict[str, Any] = owner._parameters
            if not isinstance(slots[next(iter(dtypes))], nn.Parameter):
                continue
            masters = {name: slots[name] for name in dtypes}
            self._held.append((slots, masters))
            # Into the same slot, so that the order of named_parameters() stays.
            slots.update({name: master.to(dtypes[name]) for name, master in masters.items()})

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        kept = self._outermost.pop()
        while len(self._held) > kept:
            slots, masters = self._held.pop()
            slots.update(masters)
