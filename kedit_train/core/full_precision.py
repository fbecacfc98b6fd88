"""Train the edited parameters of a half-precision model in fp32, in place.

Two neighboring bf16 numbers near 0.1 differ by 5e-4. In bf16, the small updates of an edit would be rounded away, and a
norm ball of radius 5e-5 could not be represented. So the edited parameters, their gradients and the optimizer state are
kept in fp32. Every module that reads an edited parameter computes with a copy in the model's dtype. The parameter names
and the parameter objects do not change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kedit_train.errors import warn
from kedit_train.functional.precision import HALF


class FullPrecision:
    """Keep half-precision parameters in fp32 until :meth:`remove` is called.

    Args:
        root: a module that contains the parameters. If a parameter is tied, ``root`` must contain all modules that own
            the parameter.
        parameters: name -> parameter. Half-precision parameters are converted in place (``parameter.data``).

    Attributes:
        dtypes: name -> original dtype of each parameter that was changed.
    """

    def __init__(self, root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.dtypes: dict[str, torch.dtype] = {name: p.dtype for name, p in parameters.items() if p.dtype in HALF}
        self._parameters = {name: parameters[name] for name in self.dtypes}
        original = {id(p): self.dtypes[name] for name, p in self._parameters.items()}
        owned = {
            module: {name: original[id(p)] for name, p in module._parameters.items() if id(p) in original}
            for module in root.modules()
        }
        # A module may also read the weight of one of its submodules: some attention modules pass it to F.linear, and T5
        # reads the weight's dtype. Gradient checkpointing may start its second forward pass at any of these modules.
        owners_in = {m: [(inner, owned[inner]) for inner in m.modules() if owned[inner]] for m in root.modules()}
        self._owners_in = {module: owners for module, owners in owners_in.items() if owners}
        # For each unfinished module call: the length of ``_swapped`` when the call began.
        self._stack_sizes: list[int] = []
        # For each swap: the parameter dict of the owner, and the fp32 parameters that were taken out of this dict.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> FullPrecision:
        # A copied model is an ordinary model in its own dtype. The copied hooks do nothing.
        for name, parameter in self._parameters.items():
            copied = copy.deepcopy(parameter, memo)
            copied.data = copied.data.to(self.dtypes[name])
        return FullPrecision(nn.Module(), {})

    def __reduce__(self) -> tuple[Any, ...]:
        names = list(self.dtypes)
        if names:
            warn(
                f"the model is pickled during an edit, so {names[0]} and {len(names) - 1} other parameters are saved "
                "in fp32; save the model after the edit, or save model.state_dict()."
            )
        return FullPrecision, (nn.Module(), {})

    def _before(self, module: nn.Module, args: Any) -> None:
        """Replace the fp32 parameters by half-precision copies."""
        self._stack_sizes.append(len(self._swapped))
        # A copied model has these hooks, too, but its modules are not in this dict.
        for owner, dtypes in self._owners_in.get(module, ()):
            slots: dict[str, Any] = owner._parameters
            first, dtype = next(iter(dtypes.items()))
            if slots[first].dtype == dtype:
                # An outer module has already put the copy there.
                continue
            masters = {name: slots[name] for name in dtypes}
            self._swapped.append((slots, masters))
            # update() keeps the positions of existing keys, so the order of named_parameters() does not change.
            slots.update({name: master.to(dtypes[name]) for name, master in masters.items()})

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put back the fp32 parameters that this module call replaced."""
        size = self._stack_sizes.pop()
        while len(self._swapped) > size:
            slots, masters = self._swapped.pop()
            slots.update(masters)
