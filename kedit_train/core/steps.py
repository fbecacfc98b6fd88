"""Add penalties before every optimizer step of a run, and apply constraints after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kedit_train.core.fsdp import full_tensor
from kedit_train.core.gradient_scaler import gradient_scale, skipped_by_scaler, will_skip
from kedit_train.core.gradients import check_gradients
from kedit_train.core.integrity import Integrity
from kedit_train.core.loaded_optimizer import check_loaded_optimizer
from kedit_train.core.state import RunState
from kedit_train.core.weak_hook import weak_hook
from kedit_train.errors import EditError, reported_by, warn


class OptimizerSteps:
    """Add penalties before each optimizer step and apply constraints after it, in torch's global optimizer hooks.

    The hooks ignore every optimizer that has no parameter of the scope. They work with any wrapper (accelerate, Fabric,
    DDP) and with any optimizer that calls torch's hooks. A training loop announces a step by calling :meth:`penalty`. A
    step that was not announced raises an error.

    Args:
        run: the run, with the scoped parameters.
        release: function that closes the run, called before this error if ``host.releases_model`` is True.

    Attributes:
        learning_rates: the learning rate of the last step for each scoped parameter that had a gradient, by name. The
            value is None if the optimizer has no learning rate.
        gradient_scale: the loss scale by which the gradients of the current step are multiplied, usually 1.0.
        adding_penalties: whether the callbacks are computing their penalties.
    """

    def __init__(self, run: RunState, release: Callable[[], None]) -> None:
        self.run = run
        self._release = release
        self.learning_rates: dict[str, float | None] = {}
        self.gradient_scale: Tensor | float = 1.0
        self.adding_penalties: bool = False
        # The number of steps that a gradient scaler has skipped.
        self.skipped: int = 0
        # None until the step is announced. Afterwards, whether any callback returned a penalty.
        self._penalized: bool | None = None
        # True while the host is not yet notified of the current step, because another optimizer may share this step.
        self._is_open = False
        # Whether the closure of the running step has computed its gradients.
        self._evaluated = False
        # Whether a warning about changes by other code has been issued.
        self._warned = False
        # The number of announced steps, and whether other code has changed the scope at any time.
        self._announced, self._written = 0, False
        # torch's counters of the writes to each parameter in scope, at the announcement of the current step.
        self._versions: list[int] = []
        self.integrity: Integrity = Integrity(run)
        # The optimizers whose step() is running now, from the outermost to the innermost.
        self._stepping: list[Optimizer] = []
        # The names of the parameters that each optimizer has updated since the last announcement, by id(optimizer).
        self._stepped_optimizers: dict[int, set[str]] = {}
        # The hooks are registered now, to detect a loop that never announces a step. The hooks hold weak references,
        # because global hooks would otherwise keep the model in memory.
        self._handles: list[Any] = [
            register_optimizer_step_pre_hook(weak_hook(self.pre_hook)),
            register_optimizer_step_post_hook(weak_hook(self.post_hook)),
        ]

    @property
    def is_shared(self) -> bool:
        """Whether another optimizer has already stepped since the current step was announced."""
        return bool(self._stepped_optimizers)

    def remove(self) -> None:
        """Remove the optimizer hooks."""
        for handle in self._handles:
            handle.remove()

    def begin(self, scaler: Any = None) -> None:
        """Begin a step. With a ``scaler``, the last announced step counts as skipped if no optimizer has taken it."""
        if scaler is not None and self._penalized is not None and not self._stepped_optimizers:
            self.skipped += 1
        self._penalized = None

    def penalty(self) -> Tensor | None:
        """Return the sum of the callbacks' penalties for the next optimizer step.

        The training loop calls this method before each optimizer step. With this call, the loop announces the step.

        Returns:
            A scalar, or None if there is no penalty or the step has already been announced.
        """
        if self._penalized is not None and not self._stepped_optimizers:
            return None
        run = self.run
        self._check_evaluated_once()
        self._close_step()
        self._stepped_optimizers.clear()
        if not run.host.uses_closures:
            # Remove the entry that a failed step() has left behind. With closures, the list is kept, because a running
            # step() calls this method.
            self._stepping.clear()
        late = next((callback for callback in run.callbacks if not run.has_attached(callback)), None)
        if late is not None:
            raise EditError(
                "this callback was added after training had begun; add it before training begins.",
                component=type(late).__name__,
            )
        self._announced += 1
        if self.integrity.before_step():
            self._restore_constraints()
        terms: list[Tensor] = []
        self.adding_penalties = True
        for callback in run.callbacks:
            with reported_by(type(callback).__name__):
                term = callback.penalty(run)
            if term is not None:
                terms.append(term)
        self.adding_penalties = False
        self._penalized = bool(terms)
        self._versions = [p._version for p in run.scope.values()]
        return torch.stack(terms).sum() if terms else None

    def before_optimizer_step(self, optimizer: Any, scaler: Any = None) -> None:
        """Check the final gradients, and delete them if a callback wants to skip this step.

        The gradients are deleted, not set to zero. With a zero gradient, momentum and weight decay would still change
        the parameter, but an optimizer ignores a parameter without a gradient. A callback cannot skip a step whose loss
        also contains a penalty or a comparison with the reference model (a callback with ``anchors``).
        """
        run = self.run
        self._check_announced(optimizer)
        self._check_evaluated_once()
        self._evaluated = True
        self.gradient_scale = gradient_scale(optimizer, scaler)
        self.integrity.start()
        self._check_written_since_announcement()
        self.integrity.check_frozen_gradients()
        check_gradients(run, penalized=bool(self._penalized))
        if will_skip(optimizer, scaler, [p.grad for p in run.scope.values() if p.grad is not None]):
            self.skipped, self._penalized = self.skipped + 1, None
            return
        error = run.host.gradient_error() if self._penalized and not self.is_shared else None
        if error is not None:
            raise EditError(error)
        skip: list[bool] = []
        for callback in run.callbacks:
            with reported_by(type(callback).__name__):
                callback.before_optimizer_step(run)
                skip.append(callback.skip_step(run))
        has_other_terms = self._penalized or any(callback.anchors for callback in run.callbacks)
        if any(skip) and not has_other_terms:
            for parameter in run.requires_grad_before:
                parameter.grad = None

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Apply the constraints of the callbacks in order, and write the resulting weights into the model."""
        run = self.run
        constraining = [c for c in run.callbacks if c.constrains]
        if not constraining:
            return
        current: dict[str, Tensor] = {name: p.detach() for name, p in run.scope.items()}
        weights = dict(current)
        for callback in constraining:
            with reported_by(type(callback).__name__):
                weights = callback.constrain(weights, run.reference)
        for name, parameter in run.scope.items():
            # Compare objects, not addresses: data_ptr() is 0 for every sharded tensor (FSDP2).
            if weights[name] is not current[name]:
                parameter.copy_(weights[name])

    def finish(self) -> None:
        """Check whether other code has changed the model. Apply the constraints again if it has changed the scope.

        Two examples of such code are a trainer that loads its best checkpoint, and the optimizer Lookahead.
        """
        self._close_step()
        if self.integrity.finish():
            self._restore_constraints(expected=self.run.host.loads_best_weights)
        # No warning is issued after a single announced step, because the loop may have only inspected the model.
        if self._announced > 1 and not self.run.step and not self._written:
            warn(
                f"{self._announced} training steps began, but no optimizer has updated a parameter in scope, so the "
                "edit has changed nothing; create the optimizer from edit.parameters(), or check whether a gradient "
                "scaler has skipped every step."
            )

    def _restore_constraints(self, expected: bool = False) -> None:
        """Apply the constraints again after other code has changed the weights, and warn about the change.

        Args:
            expected: whether the training loop made this change itself. If True, warn only about a broken constraint.
        """
        run = self.run
        self._written = True
        before = {name: p.detach().clone() for name, p in run.scope.items()}
        self.learning_rates = {}
        self.apply_constraints()
        moved = [
            name
            for name, p in run.scope.items()
            if not torch.allclose(full_tensor(p.detach()), full_tensor(before[name]), rtol=1e-5, atol=0.0)
        ]
        if moved:
            warn(
                f"other code has changed {moved[0]} (and {len(moved) - 1} other parameters) outside of the optimizer "
                "steps, and has broken the constraints of this edit; the constraints have been applied again."
            )
        # A change without an optimizer step may be the user's own update, so it gives no warning.
        elif self.integrity.written_after_step and not expected and not self._warned:
            self._warn_written(self.integrity.written)
        self.integrity.record_scope()

    def _check_written_since_announcement(self) -> None:
        """Warn if other code has written to the scope since the current step was announced.

        Writes through ``parameter.data`` are not detected here.
        """
        versions, self._versions = self._versions, []
        if not versions or self.is_shared or self._warned:
            return
        if versions != [p._version for p in self.run.scope.values()]:
            # The counters also change when a callback writes other values temporarily and restores the old ones.
            written = self.integrity.changed_in_scope()
            if written:
                self._warn_written(written)

    def _warn_written(self, names: list[str]) -> None:
        self._warned = True
        warn(
            f"other code has changed {names[0]} (and {len(names) - 1} other parameters) outside of the optimizer "
            "steps, so the weights also contain changes that are not from this edit; update the weights only in step() "
            "of a torch.optim.Optimizer, or ignore this warning if the other code averages weights."
        )

    def _check_announced(self, optimizer: Any) -> None:
        """Raise an error if the training loop had to announce this optimizer step and did not."""
        run = self.run
        penalizes = any(callback.penalizes for callback in run.callbacks)
        # Several optimizers may share the step that was announced, but each of them may step only once.
        announced = self._penalized is not None and id(optimizer) not in self._stepped_optimizers
        if run.has_started and (announced or not (run.host.announces_every_step or penalizes)):
            return
        if run.host.releases_model:
            self._release()
        raise EditError(run.host.unannounced_step_error())

    def _check_after_backward(self, optimizer: Optimizer) -> None:
        """Raise an error if step() was called inside a backward pass and a callback depends on complete steps.

        Such a callback would change weights that the backward pass still needs, or measure a partly updated model.
        """
        # torch has no public function for this. Outside of a backward pass, the result is -1.
        if torch._C._current_graph_task_id() == -1:
            return
        if any(c.constrains or c.penalizes or c.skips or c.follows_steps for c in self.run.callbacks):
            raise EditError(
                f"{type(optimizer).__name__}.step() was called inside backward(), so the callbacks cannot act on the "
                "complete step; create one optimizer for all parameters, and call its step() after backward(). "
                "Possible causes: an optimizer in a gradient hook, _apply_optimizer_in_backward, or a layerwise "
                "optimizer of transformers."
            )

    def pre_hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.integrity.check_optimizer(optimizer)
        if not self._names(optimizer):
            return
        check_loaded_optimizer(self.run, optimizer)
        self._check_after_backward(optimizer)
        self._stepping.append(optimizer)
        if len(self._stepping) > 1:
            # The step() of another optimizer has called this step(). Together they count as one step.
            return
        self._evaluated = False
        # torch passes the optimizer itself as the first argument.
        closure = next((a for a in args if a is not optimizer), kwargs.get("closure"))
        if closure is None:
            self.before_optimizer_step(optimizer)
        elif not self.run.host.uses_closures:
            # The gradients that exist now are those of the previous step. The closure will compute new ones.
            self._check_announced(optimizer)
            for callback in self.run.callbacks:
                if callback.penalizes or callback.skips:
                    raise EditError(
                        "optimizer.step(closure) computes gradients inside the step, where this callback cannot "
                        "change them; call backward() first and optimizer.step() without a closure.",
                        component=type(callback).__name__,
                    )

    @torch.no_grad()
    def post_hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        names = self._names(optimizer)
        if not names:
            return
        # If an earlier step() raised an error, its optimizer and the optimizers inside it are still in the list.
        while self._stepping and self._stepping.pop() is not optimizer:
            pass
        if self._stepping or skipped_by_scaler(optimizer):
            return
        if not self._stepped_optimizers or id(optimizer) in self._stepped_optimizers:
            # In Lightning, an optimizer may step without an announcement.
            self._stepped_optimizers.clear()
            self.run.step += 1
        self._stepped_optimizers[id(optimizer)] = names
        self.learning_rates = self._current_learning_rates(optimizer)
        self.integrity.check_gradients(self.learning_rates)
        self.apply_constraints()
        self.integrity.after_step()
        self._is_open = True
        updated = set().union(*self._stepped_optimizers.values())
        if all(name in updated for name, p in self.run.scope.items() if p.grad is not None):
            self._close_step()

    def _close_step(self) -> None:
        """Notify the host that a step is complete, once per step.

        If several optimizers share a step, the step is complete when every parameter with a gradient has been updated
        or, at the latest, when the next step is announced.
        """
        if self._is_open:
            self._is_open = False
            self.run.host.after_optimizer_step(self.run)

    def _check_evaluated_once(self) -> None:
        """Raise an error if an optimizer calls its closure a second time in one step, as LBFGS does."""
        if self._stepping and self._evaluated:
            raise EditError(
                f"{type(self._stepping[0]).__name__} computes the loss and changes the weights several times in "
                "one step(), but constraints are applied only after step(); use max_iter=1 (LBFGS) or another "
                "optimizer."
            )

    def _current_learning_rates(self, optimizer: Optimizer) -> dict[str, float | None]:
        names = {id(p): name for name, p in self.run.scope.items()}
        return {
            names[id(p)]: None if (rate := group.get("lr")) is None else float(rate)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in names and p.grad is not None
        }

    def _names(self, optimizer: Optimizer) -> set[str]:
        """Return the names of the parameters in scope that belong to the optimizer."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name for name, p in self.run.scope.items() if id(p) in own}
