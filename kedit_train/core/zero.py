"""Call the hooks of a run in the optimizer steps of DeepSpeed ZeRO-1 and ZeRO-2.

With ZeRO-1 and ZeRO-2, every process has all weights, but updates only a part of them, in a flat fp32 copy. After the
update, every process gets the new weights from the other processes.

The optimizer hooks of torch see only the flat copies. Therefore, :class:`ZeroSteps` replaces the method ``step`` of the
ZeRO optimizer. The new method passes the whole weights and gradients to the hooks of the run. The hooks may change the
new weights, for example to enforce a constraint. Finally, the method writes these weights into the flat copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.errors import EditError


def zero_optimizer(scope: Mapping[str, nn.Parameter]) -> Any | None:
    """Return the optimizer of ZeRO-1 or ZeRO-2 that trains the parameters in scope, or None."""
    # The parameters and the model have no reference to the optimizer, except in the gradient hooks of the optimizer.
    for parameter in scope.values():
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            owner = inspect.getclosurevars(hook).nonlocals.get("self") if inspect.isfunction(hook) else None
            if hasattr(owner, "averaged_gradients") and hasattr(owner, "bit16_groups"):
                return owner
    return None


def unsupported_reason(zero: Any) -> str | None:
    """Return why constraints cannot be enforced with this ZeRO optimizer, or None if they can."""
    if zero.dtype != torch.float32:
        # The fp32 copies would be rounded to half precision after every step.
        return "the DeepSpeed config enables bf16 or fp16 (remove both sections, and use torch_autocast instead)"
    return "DeepSpeed keeps the optimizer on the CPU (remove offload_optimizer)" if zero.cpu_offload else None


class ScopeGroups:
    """The parameter groups of a ZeRO optimizer, with the parameters of the model instead of their flat copies."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    @property
    def defaults(self) -> dict[str, Any]:
        return self._zero.optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups = zip(self._zero.optimizer.param_groups, self._zero.bit16_groups, strict=True)
        return [{**group, "params": list(parameters)} for group, parameters in groups]


class ZeroSteps:
    """Calls the hooks of a run at every step of a ZeRO optimizer.

    This class also adds the gradients of penalties to the gradients of the loss.

    Args:
        run: the run whose hooks are called.
        zero: the optimizer, ``DeepSpeedZeroOptimizer``.
    """

    def __init__(self, run: Any, zero: Any) -> None:
        self._run, self._zero, self._groups = run, zero, ScopeGroups(zero)
        self._step = zero.step
        zero.step = self._observed_step
        self._penalties: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        for name, parameter in run.scope.items():
            engine = list(parameter._post_accumulate_grad_hooks or {})
            self._handles.append(parameter.register_hook(_moves_to_end(parameter, engine)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._adds_penalty(name)))

    def add_penalty(self, penalty: Tensor) -> None:
        """Add the gradients of a penalty to the gradients of the next backward pass.

        DeepSpeed reduces each gradient as soon as it is complete, so a penalty cannot have its own backward pass.
        """
        scope = self._run.scope
        gradients = torch.autograd.grad(penalty, list(scope.values()), allow_unused=True)
        self._penalties = {n: g for n, g in zip(scope, gradients, strict=True) if g is not None}

    def remove(self) -> None:
        """Restore the optimizer, and remove the hooks from the parameters."""
        self._zero.step = self._step
        for handle in self._handles:
            handle.remove()
        self._handles, self._penalties = [], {}

    def _adds_penalty(self, name: str) -> Any:
        def add(parameter: Tensor) -> None:
            gradient = self._penalties.pop(name, None)
            if gradient is not None and parameter.grad is not None:
                parameter.grad.add_(gradient)

        return add

    def _observed_step(self, *args: Any, **kwargs: Any) -> None:
        run, scope = self._run, self._run.scope
        if self._penalties:
            raise EditError(
                "with DeepSpeed, every parameter with a penalty must also get a gradient from the loss, got none for "
                f"{next(iter(self._penalties))}; call edit.before_step() before the backward pass of the loss, or "
                "remove this parameter from the scope."
            )
        kept = {name: parameter.grad for name, parameter in scope.items()}
        for parameter in scope.values():
            parameter.grad = parameter.get_full_hp_grad().to(parameter.dtype)
            # Other code may have changed the weights since the last step. DeepSpeed would overwrite the changed weights
            # with its fp32 copy, so the copy is updated here.
            parameter.set_full_hp_param(parameter.detach())
        run.steps.pre_hook(self._groups, (), {})
        gradients = {name: parameter.grad for name, parameter in scope.items()}
        for name, parameter in scope.items():
            parameter.grad = kept[name]
        if any(gradient is not None for gradient in gradients.values()):
            self._step(*args, **kwargs)
        else:
            # A callback has skipped this step by removing all gradients, so DeepSpeed's own gradients are removed, too.
            self._zero.zero_grad(set_to_none=True)
            for found in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
                found.update(dict.fromkeys(found))
        for name, parameter in scope.items():
            parameter.grad = gradients[name]
        run.steps.post_hook(self._groups, (), {})
        for parameter in scope.values():
            parameter.set_full_hp_param(parameter.detach())
            parameter.grad = None


def _moves_to_end(parameter: Any, keys: list[int]) -> Any:
    """Return a hook that moves the hooks of DeepSpeed behind all other hooks of a parameter.

    The hooks of DeepSpeed must run last, so that DeepSpeed reads the gradients after all callbacks have changed them.

    Args:
        parameter: the parameter.
        keys: the keys of DeepSpeed's hooks in ``parameter._post_accumulate_grad_hooks``.
    """

    def move(_: Tensor) -> None:
        hooks = parameter._post_accumulate_grad_hooks
        for key in keys:
            if key in hooks:
                # torch calls the hooks in the order of insertion, which move_to_end() does not change.
                hooks[key] = hooks.pop(key)

    return move
