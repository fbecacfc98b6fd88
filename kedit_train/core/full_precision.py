"""Train a half-precision model's scope in fp32, in place: same parameters, same names, half precision again at the end.

A bf16 number near 0.1 has neighbours 5e-4 away, so an edit's small updates are rounded to nothing and a ball of 5e-5
cannot be represented. Here the scoped parameters themselves become fp32 (the optimizer, its state and their gradients
with them), and every module that owns one computes with a copy in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
        self._handles: list[Any] = []
        stored = {id(p): self.dtypes[name] for name, p in self._parameters.items()}
        for module in root.modules():
            own = {name: stored[id(p)] for name, p in module._parameters.items() if id(p) in stored}
            if own:
                self._install(module, own)
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()

    def remove(self) -> None:
        """Round the parameters to the dtype that they had and leave the modules as they were."""
        for handle in self._handles:
            handle.remove()
        for name, parameter in self._parameters.items():
            parameter.data = parameter.data.to(self.dtypes[name])
            parameter.grad = None

    def _install(self, module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        masters: list[dict[str, Any]] = []

        def before(owner: nn.Module, *_: Any) -> None:
            held: dict[str, Any] = {name: owner._parameters[name] for name in dtypes}
            masters.append(held)
            for name, master in held.items():
                # Into the same slot, so that the order of named_parameters() stays; a plain tensor will do in there.
                slots: dict[str, Any] = owner._parameters
                slots[name] = master.to(dtypes[name])

        def after(owner: nn.Module, *_: Any) -> None:
            slots: dict[str, Any] = owner._parameters
            slots.update(masters.pop())

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))
