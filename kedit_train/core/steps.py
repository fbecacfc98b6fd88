"""What an edit does around every optimizer step: announced before it, penalised once, constrained after it."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kedit_train.core.fsdp import check_gradients, whole
from kedit_train.errors import EditError, reported_by

if TYPE_CHECKING:
    from kedit_train.core.run import EditRun


class OptimizerSteps:
    """Follows the optimizers that step a run's scope, through torch's own hooks, whatever wraps them.

    Attributes:
        count: optimizer steps taken.
        learning_rates: name -> the learning rate (None where the optimizer has none of its own) with which a scoped
            parameter has just been stepped; without those that were passed over for want of a gradient.
    """

    def __init__(self, run: EditRun) -> None:
        self.run = run
        self.count = 0
        self.learning_rates: dict[str, float | None] = {}
        self._penalised: bool | None = None
        self._versions: list[int] = []
        self._steppers: set[int] = set()
        # From the beginning, so that a loop that never reaches the run is noticed; weakly, so that they keep no model.
        self._handles: list[Any] = [
            register_optimizer_step_pre_hook(_weakly(self._before)),
            register_optimizer_step_post_hook(_weakly(self._after)),
        ]

    def remove(self) -> None:
        """Let the optimizers go."""
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """A new optimizer step begins, whatever became of the last one (a gradient scaler may have left it out)."""
        self._penalised = None

    def penalty(self) -> Tensor | None:
        """The sum of the callbacks' penalties, on the first call for an optimizer step; None afterwards."""
        if self._penalised is not None:
            return None
        self._steppers.clear()
        run = self.run
        if any(not run.has_attached(callback) for callback in run.callbacks):
            late = next(callback for callback in run.callbacks if not run.has_attached(callback))
            raise EditError(f"{late!r} joined when training had begun; name it before training begins")
        terms: list[Tensor] = []
        for callback in run.callbacks:
            with reported_by(type(callback).__name__):
                term = callback.penalty(run)
            if term is not None:
                terms.append(term)
        self._penalised = bool(terms)
        return torch.stack(terms).sum() if terms else None

    def before(self, optimizer: Any) -> None:
        """Gradients are complete: where a callback wants no step and no penalty pulls, take them away.

        A parameter without gradient is passed over by every optimizer, its state included; one with a zero gradient is
        not: momentum and weight decay move it.
        """
        run = self.run
        self._check_announced(optimizer)
        check_gradients(run.scope.values())
        wrong = run.host.check_gradients() if self._penalised else None
        if wrong is not None:
            raise EditError(wrong)
        skip: list[bool] = []
        for callback in run.callbacks:
            with reported_by(type(callback).__name__):
                skip.append(callback.skip_step(run))
        pulls = self._penalised or any(callback.anchors for callback in run.callbacks)
        if any(skip) and not pulls:
            for parameter in run.trainable:
                parameter.grad = None

    @torch.no_grad()
    def constrain(self) -> None:
        """Write back what the callbacks make of the weights, in their order; what did not change is not written."""
        run = self.run
        constraining = [c for c in run.callbacks if c.constrains]
        if not constraining:
            return
        stepped: dict[str, Tensor] = {name: p.detach() for name, p in run.scope.items()}
        weights = dict(stepped)
        for callback in constraining:
            with reported_by(type(callback).__name__):
                weights = callback.constrain(weights, run.reference)
        for name, parameter in run.scope.items():
            # Not by address, which is 0 for every sharded tensor (FSDP2).
            if weights[name] is not stepped[name]:
                parameter.copy_(weights[name])

    def _check_announced(self, optimizer: Any) -> None:
        run = self.run
        penalises = any(callback.penalises for callback in run.callbacks)
        if run.attached and (self._penalised is not None or not (run.host.announces_steps or penalises)):
            return
        if self._steppers and id(optimizer) not in self._steppers:
            # Another optimizer's part of the step that was announced.
            return
        if run.host.releases:
            run.close()
        raise EditError(run.host.unannounced())

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._ours(optimizer):
            return
        # torch hands the optimizer itself over as the first argument.
        closure = next((a for a in args if a is not optimizer), kwargs.get("closure"))
        if closure is None:
            self.before(optimizer)
        elif not self.run.host.steps_with_closures:
            # The gradients of now are those of the step before; the closure makes new ones, without the penalties.
            self._check_announced(optimizer)
            for callback in self.run.callbacks:
                if callback.penalises or callback.skips:
                    raise EditError(
                        f"{type(callback).__name__} cannot join optimizer.step(closure): the gradients that it needs "
                        "are made within the step; call backward() first and optimizer.step() without a closure"
                    )

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._ours(optimizer) or _left_out(optimizer):
            return
        self.count += 1
        self._penalised = None
        self._steppers.add(id(optimizer))
        self.learning_rates = self._rates(optimizer)
        self.constrain()
        self._versions = self._written()
        self.run.host.stepped(self.run)

    def check_untouched(self) -> None:
        """Let the constraints hold at the end of training whoever wrote the weights since the last step, and say so.

        Averages of weights, a loaded best checkpoint and optimizers that do not call torch's hooks come to the scope
        outside of an optimizer's step.
        """
        if self._versions == self._written():
            return
        run = self.run
        before = {name: p.detach().clone() for name, p in run.scope.items()}
        self.learning_rates = {}
        self.constrain()
        moved = [
            name
            for name, p in run.scope.items()
            if not torch.allclose(whole(p.detach()), whole(before[name]), rtol=1e-5, atol=0.0)
        ]
        if moved:
            warnings.warn(
                f"{moved[0]} (and {len(moved) - 1} more) was changed outside of an optimizer step that torch's hooks "
                "see, and broke the edit's constraints; it has been brought back within them",
                stacklevel=2,
            )

    def _written(self) -> list[int]:
        return [p._version for p in self.run.scope.values()]

    def _rates(self, optimizer: Optimizer) -> dict[str, float | None]:
        names = {id(p): name for name, p in self.run.scope.items()}
        return {
            names[id(p)]: None if (rate := group.get("lr")) is None else float(rate)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in names and p.grad is not None
        }

    def _ours(self, optimizer: Optimizer) -> bool:
        ours = {id(p) for p in self.run.scope.values()}
        return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])


def _left_out(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has left the step out by itself: a gradient scaler found infinite gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _weakly(method: Any) -> Any:
    held = weakref.WeakMethod(method)

    def hook(*args: Any) -> None:
        alive = held()
        if alive is not None:
            alive(*args)

    return hook
