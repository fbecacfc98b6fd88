"""Detect weight changes that were not made by an optimizer step of the run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kedit_train.core.checksums import checksums, first_not_finite
from kedit_train.core.drift.shards import local_part
from kedit_train.core.fsdp import reshard
from kedit_train.core.processes import is_distributed
from kedit_train.core.resume import has_checksum
from kedit_train.core.state import RunState
from kedit_train.errors import EditError

# Each step checks frozen parameters that together have about this many entries plus the number of entries in scope.
ENTRIES_PER_STEP = 100_000


class Integrity:
    """Check at every optimizer step that no other code has changed the weights.

    The run enforces its constraints in torch's optimizer hooks. Code that changes weights without an optimizer step
    does not call these hooks, so the constraints would not hold. This class detects such changes: it compares
    the checksums of parameters with earlier checksums. At each step, it checks the scope and a part of the frozen
    parameters. After the first step and at the end of training, it checks all frozen parameters.

    Args:
        run: the run whose weights are checked.
    """

    def __init__(self, run: RunState) -> None:
        self.run = run
        self._started = self.ended = False
        # Checksums of the scope after the last optimizer step. Before the first step, checksums at the start.
        self._scope_sums: list[int] = []
        # Whether an optimizer hook was called since the training loop last announced a step.
        self._step_seen = True
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self._frozen_sums: list[int] = []
        # The dtypes and checksums of the frozen parameters when the scope was set, by name.
        self._frozen_before: dict[str, tuple[torch.dtype, int]] = {}
        # All parameters at the start, by id.
        self._present: dict[int, nn.Parameter] = {}
        # The names of offloaded parameters (meta device). Each forward pass makes new objects for them.
        self._offloaded: set[str] = set()
        # The dtypes of the parameters in scope, and the names of those that were trainable at the start.
        self._dtypes: dict[str, torch.dtype] = {}
        self._trainable: set[str] = set()
        # The parameters in scope that other code had changed when before_step() was last called.
        self.written: list[str] = []
        # Whether an optimizer step came before that change. Without a step, the user may have made the change.
        self.written_after_step: bool = False
        # Position in ``_frozen`` of the next parameter to compare.
        self._next = 0

    def record_frozen(self) -> None:
        """Record checksums of the frozen parameters. Called when the scope is set, before the optimizer exists."""
        if is_distributed():
            # Before the first step, DDP may copy the weights of process 0 to this process, so the values may change.
            return
        in_scope = {id(p) for p in self.run.scope.values()}
        frozen = {n: p for n, p in self.run.root.named_parameters() if id(p) not in in_scope and has_checksum(p)}
        sums = checksums(frozen.values())
        self._frozen_before = {n: (p.dtype, value) for (n, p), value in zip(frozen.items(), sums, strict=True)}

    def start(self) -> None:
        """Record checksums of all weights. Call this after all callbacks have attached. Later calls do nothing."""
        if self._started:
            return
        self._started = True
        # After a forward pass, FSDP2 may still use gathered copies of the parameters, and frees them later.
        reshard(self.run.root)
        self._check_trainable()
        in_scope = {id(p) for p in self.run.scope.values()}
        self._check_still_frozen(in_scope)
        self._frozen = [
            (name, p)
            for name, p in self.run.root.named_parameters()
            if id(p) not in in_scope and not p.requires_grad and not p.is_meta
        ]
        for _, parameter in self._frozen:
            # A gradient from before the freeze would let an optimizer move the parameter.
            parameter.grad = None
        self._frozen_sums = checksums(p for _, p in self._frozen)
        self._check_unchanged_since_freeze()
        self._present = {id(p): p for p in self.run.root.parameters()}
        self._offloaded = {name for name, p in self.run.root.named_parameters() if p.is_meta}
        self._dtypes = {name: p.dtype for name, p in self.run.scope.items()}
        self._trainable = {name for name, p in self.run.scope.items() if p.requires_grad}
        self._scope_sums = self._scope_now()

    def _check_unchanged_since_freeze(self) -> None:
        """Raise an error if other code has written to a frozen parameter between the freeze and the first step."""
        before, self._frozen_before = self._frozen_before, {}
        if self.run.host.resumed:
            return
        for (name, parameter), value in zip(self._frozen, self._frozen_sums, strict=True):
            # The loop may have converted the frozen parameters to its own dtype.
            if name in before and before[name][0] == parameter.dtype and before[name][1] != value:
                raise EditError(
                    f"{name} is not in scope, but its values have changed between the start of the edit and the first "
                    "step; load or change weights before the edit starts. To resume from a checkpoint in a plain "
                    "loop, also call edit.load_state_dict()."
                )

    def _check_still_frozen(self, in_scope: set[int]) -> None:
        """Raise an error if other code has unfrozen a parameter between the freeze and the first step."""
        if not self.run.frozen_outside:
            return
        for name, parameter in self.run.root.named_parameters():
            if parameter.requires_grad and id(parameter) not in in_scope:
                raise EditError(
                    f"{name} is not in scope, but its requires_grad is True before the first step, because other code "
                    "(for example configure_optimizers or unfreeze()) has changed it; remove this code, or add the "
                    "parameter to the scope with ParameterScope."
                )

    def _check_trainable(self) -> None:
        """Raise an error if the whole scope is frozen, or if a parameter in scope was frozen after the first check."""
        scope = self.run.scope
        frozen = next((name for name in scope if name in self._trainable and not scope[name].requires_grad), None)
        if frozen is not None and any(p.requires_grad for p in scope.values()):
            raise EditError(
                f"{frozen} is in scope, but other code has set its requires_grad to False before step "
                f"{self.run.step + 1}; remove this code, or select other parameters with ParameterScope."
            )
        if scope and not any(p.requires_grad for p in scope.values()):
            raise EditError(
                f"no parameter in scope can be trained at step {self.run.step + 1}, because other code has set "
                f"requires_grad to False for all of them, for example {next(iter(scope))}; remove this code, or "
                "select other parameters with ParameterScope."
            )

    def _check_objects(self, module: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Raise an error if the model uses another parameter object than the one that the run observes."""
        for name, parameter in parameters:
            try:
                current = module.get_parameter(name)
            except AttributeError:
                current = None
            # FSDP2 replaces a sharded parameter by a gathered copy for a while.
            gathered = isinstance(parameter, DTensor) and current is not None and not isinstance(current, DTensor)
            if current is not parameter and not gathered:
                raise EditError(
                    f"{name} was replaced by another object after training had begun, so the edit cannot constrain it "
                    "(possible causes: load_state_dict(assign=True), a module that was exchanged, a converted model); "
                    "load weights without assign=True, and change modules before the edit."
                )

    def _check_dtypes(self) -> None:
        """Raise an error if the model was converted to another dtype after the start."""
        for name, parameter in self.run.scope.items():
            if parameter.dtype != self._dtypes[name]:
                raise EditError(
                    f"{name} was converted from {self._dtypes[name]} to {parameter.dtype} before step "
                    f"{self.run.step + 1}, so its reference weights and the state of the optimizer no longer fit; "
                    "convert the model before the edit."
                )

    def check_optimizer(self, optimizer: Any) -> None:
        """Raise an error if the optimizer trains a parameter that was added to the model after training had begun."""
        if not self._started:
            return
        late = {
            id(p)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad and id(p) not in self._present
        }
        # ``late`` is usually empty. It may also contain parameters of another model, which are allowed.
        name = next((n for n, p in self.run.root.named_parameters() if id(p) in late), None) if late else None
        if name is not None:
            raise EditError(self._added(name))

    def _added(self, name: str) -> str:
        return (
            f"{name} was added to the model after training had begun (detected before step {self.run.step + 1}), so it "
            "is neither in scope nor frozen; add modules and adapters before the edit."
        )

    def frozen_checksums(self) -> dict[str, int]:
        """Return the checksums of the frozen parameters at the start of the run, for a checkpoint."""
        pairs = zip(self._frozen, self._frozen_sums, strict=True)
        return {name: value for (name, parameter), value in pairs if has_checksum(parameter)}

    def before_step(self) -> bool:
        """Check the weights before an optimizer step, when the training loop calls ``run.steps.penalty()``.

        Returns:
            True if other code has changed a parameter in scope since the last optimizer step.

        Raises:
            EditError: a frozen parameter has a gradient, or a parameter in scope was frozen, replaced or converted to
                another dtype. If a callback sets ``constrains`` or ``follows_steps``, the error is also raised if the
                scope has changed since the last call, although no optimizer step was detected.
        """
        if not self._started:
            self.start()
            self._step_seen = False
            return False
        self._check_objects(self.run.model, self.run.scope.items())
        self._check_dtypes()
        self._check_trainable()
        self.check_frozen_gradients()
        self.written = self.changed_in_scope()
        self.written_after_step = bool(self.written) and self._step_seen
        if self.written and not self._step_seen and any(c.constrains or c.follows_steps for c in self.run.callbacks):
            raise EditError(self._unseen_step())
        self._step_seen = False
        return bool(self.written)

    def check_frozen_gradients(self) -> None:
        """Raise an error if a frozen parameter has a gradient, before an optimizer can use it."""
        name = next((name for name, p in self._frozen if p.grad is not None), None)
        if name is not None:
            raise EditError(
                f"{name} is not in scope, but has a gradient at step {self.run.step + 1}. Other code (for example "
                "BaseFinetuning or unfreeze()) has set its requires_grad to True; remove this code, or add the "
                "parameter to the scope with ParameterScope."
            )

    def check_gradients(self, names: Iterable[str]) -> None:
        """Raise an error if an optimizer has used a NaN or infinite gradient.

        A check of the weights alone would not be enough, because a constraint could hide NaN values in the weights.
        If a gradient scaler skips a step, this method is not called.

        Args:
            names: the names of the parameters that the optimizer has updated.
        """
        gradients = {name: g for name in names if (g := self.run.scope[name].grad) is not None and not g.is_sparse}
        position = first_not_finite(gradients.values())
        if position is not None:
            raise EditError(
                f"the gradient of {list(gradients)[position]} contains NaN or infinite values at step {self.run.step}; "
                "lower the learning rate, check the loss of this batch, or use a GradScaler in fp16."
            )

    def after_step(self) -> None:
        """Check the weights when a step and its constraints are complete, and record new checksums of the scope.

        Raises:
            EditError: a weight in scope is not finite, or a frozen parameter has changed.
        """
        self.start()
        names = list(self.run.scope)
        position = first_not_finite(self.run.scope.values())
        if position is not None:
            raise EditError(
                f"{names[position]} contains NaN or infinite values after step {self.run.step}; lower the learning "
                "rate, clip the gradients, or check the loss of this batch."
            )
        self._scope_sums, self._step_seen = self._scope_now(), True
        self._compare_frozen(every=self.run.step <= 1)

    def finish(self) -> bool:
        """Check all weights at the end of training, and return the result of :meth:`before_step`.

        Raises:
            EditError: as in :meth:`before_step`, or a frozen parameter has changed, or the model has new parameters.
        """
        if not self._started:
            return False
        changed = self.before_step()
        self._compare_frozen(every=True)
        self._check_added()
        return changed

    def _check_added(self) -> None:
        """Raise an error if the model has parameters that it did not have at the start."""
        reshard(self.run.root)
        new = (name for name, p in self.run.root.named_parameters() if id(p) not in self._present)
        added = next((name for name in new if name not in self._offloaded), None)
        if added is not None:
            raise EditError(self._added(added))

    def end(self) -> None:
        """Record checksums at the end of the run, for :func:`~kedit_train.core.after_end.check_after_end`."""
        self.ended: bool = self._started
        self.record_scope()

    def changed(self) -> str | None:
        """Return the name of a parameter whose values do not match its last checksum, or None."""
        reshard(self.run.root)
        frozen = zip(self._frozen, checksums(p for _, p in self._frozen), self._frozen_sums, strict=True)
        return next(iter([*self.changed_in_scope(), *(n for (n, _), new, old in frozen if new != old)]), None)

    def changed_in_scope(self) -> list[str]:
        """Return the names of the parameters in scope whose values do not match their last checksums."""
        sums = zip(self.run.scope, self._scope_now(), self._scope_sums, strict=True)
        return [name for name, new, old in sums if new != old]

    def record_scope(self) -> None:
        """Record new checksums of the parameters in scope. Call this after the run itself has changed them."""
        self._scope_sums = self._scope_now()

    def _scope_now(self) -> list[int]:
        return checksums(self.run.scope.values())

    def _compare_frozen(self, every: bool) -> None:
        if not self._frozen:
            return
        positions = list(range(len(self._frozen))) if every else self._in_turn()
        self._check_objects(self.run.root, (self._frozen[i] for i in positions))
        now = checksums(self._frozen[i][1] for i in positions)
        changed = next((i for i, value in zip(positions, now, strict=True) if value != self._frozen_sums[i]), None)
        if changed is not None:
            name = self._frozen[changed][0]
            raise EditError(
                f"{name} is not in scope, but its values have changed before step {self.run.step + 1} "
                f"({self._cause()}); remove this cause, or add the parameter to the scope with ParameterScope."
            )

    def _in_turn(self) -> list[int]:
        """Return the positions of the frozen parameters to check at this step. The next step continues after them."""
        budget = ENTRIES_PER_STEP + sum(local_part(p).numel() for p in self.run.scope.values())
        positions: list[int] = []
        while budget > 0 and len(positions) < len(self._frozen):
            positions.append(self._next)
            budget -= local_part(self._frozen[self._next][1]).numel()
            self._next = (self._next + 1) % len(self._frozen)
        return positions

    def _unseen_step(self) -> str:
        return (
            f"the weights in scope have changed after step {self.run.step} although no optimizer step was detected, so "
            f"the constraints were not enforced ({self._cause()}); update the weights only in step() of a "
            "torch.optim.Optimizer, and use DDP, FSDP2 (fully_shard) or a single process."
        )

    def _cause(self) -> str:
        parameters = [*self.run.scope.values(), *(p for _, p in self._frozen)]
        if any(uses_deepspeed(p) for p in parameters):
            return "DeepSpeed updates flattened copies of the weights"
        return (
            "possible causes: an optimizer that updates weights in the backward pass or does not call torch's hooks, "
            "or other code that writes to the weights"
        )


def uses_deepspeed(parameter: Any) -> bool:
    """Return whether DeepSpeed ZeRO manages a parameter. ZeRO adds an attribute to each parameter that it manages."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
