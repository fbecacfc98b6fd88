"""The lifecycle of one edit of one model, which all callbacks of the edit share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kedit_train.core.fsdp import full_tensor, reshard
from kedit_train.core.full_precision import FullPrecision
from kedit_train.core.gate.guards import check_not_gated_and_frozen, check_not_gated_before
from kedit_train.core.host import Host
from kedit_train.core.interrupted import check_not_interrupted, mark_interrupted
from kedit_train.core.output_head import OutputHead
from kedit_train.core.processes import is_distributed
from kedit_train.core.rank_agreement import agreeing_processes
from kedit_train.core.reference_weights import check_stored, check_unchanged, snapshot, temporary_values
from kedit_train.core.requirements import check_duplicates, check_requirements
from kedit_train.core.resume import checkpoint_state, restore
from kedit_train.core.state import RunState
from kedit_train.core.steps import OptimizerSteps
from kedit_train.core.strategy import follow_dtype, follow_strategy
from kedit_train.core.tokenizer import find_tokenizer
from kedit_train.core.tokens.loss_head import LossHead
from kedit_train.errors import EditError, reported_by

_ATTRIBUTE = "_kedit_run"


class EditRun(RunState):
    """One edit of one model, shared by all callbacks on that model.

    The training loop reports its events to the run through a :class:`~kedit_train.core.host.Host`. The run then calls
    the callbacks in the right order. :class:`~kedit_train.callbacks.base.EditCallback` describes the lifecycle of a
    callback. The first callback creates the run and stores it on the model, where later callbacks find it.

    Args:
        root: the module that the training loop trains.
        host: the interface of the training loop.

    Attributes:
        steps: adds penalties before each optimizer step and applies constraints after it.

    The other attributes are those of :class:`~kedit_train.core.state.RunState`.
    """

    def __init__(self, root: nn.Module, host: Host) -> None:
        super().__init__(root, host)
        self.steps: OptimizerSteps = OptimizerSteps(self, release=self.close)
        self._head: OutputHead | None = None
        self._loss_head: LossHead | None = None
        self._finished: set[int] = set()
        self._complete = False  # True if training has ended and the constraints hold.
        self._saved_states: dict[Any, dict[str, Any]] = {}
        root.__dict__[_ATTRIBUTE] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # A copied or pickled model is an ordinary model. The run stays with the original.

    # -- the lifecycle

    @classmethod
    def join(cls, root: nn.Module, callback: Any, host: Host) -> EditRun:
        """Add ``callback`` to the run of ``root``. If ``root`` has no run, create one.

        ``root`` may still have the run of another training loop. If that loop no longer uses its run
        (:meth:`Host.is_editing` is False), the run is closed, and a new one is created.

        Args:
            root: the module that the training loop trains.
            callback: an :class:`~kedit_train.callbacks.base.EditCallback`. Its ``prepare`` method is called.
            host: the interface of the training loop.

        Raises:
            EditError: ``callback`` is a class and not an instance, another training loop is editing the model, the run
                would have two callbacks of a class that may be used only once, or ``callback.prepare`` fails.
        """
        if isinstance(callback, type):
            name = callback.__name__
            raise EditError(f"{name} is a class, but callbacks must be instances; pass {name}(...).")
        run: EditRun | None = root.__dict__.get(_ATTRIBUTE)
        if run is not None and run.host.owner is not host.owner:
            if run.host.is_editing(run):
                # Closing that run would silently end its constraints.
                first = ", ".join(type(c).__name__ for c in run.callbacks)
                raise EditError(
                    f"this model can be in only one edit at a time, but an edit with {first} has not ended; "
                    "pass all callbacks to one edit, or end the first edit before you begin this one.",
                    component=type(callback).__name__,
                )
            run.close()
            run = None
        run = run or cls(root, host)
        previous = getattr(callback, "run", None)
        if previous is not None and previous is not run and not previous.closed:
            # A callback serves one model at a time. The loop of the earlier model gets an error at its next step.
            previous.close()
        if callback not in run.callbacks:
            joined = [*run.callbacks, callback]
            # Ties are broken by name, so that the order of the user's list does not matter.
            try:
                check_duplicates(joined)
                run.callbacks = sorted(joined, key=lambda c: (c.order, type(c).__name__, repr(c)))
                with reported_by(type(callback).__name__):
                    check_not_gated_and_frozen(run)
                    callback.prepare(run)
            except BaseException:
                run.close()
                raise
        return run

    def is_driver(self, callback: Any) -> bool:
        """Return whether this callback is the first callback of the run.

        Only the first callback reports the events of the training loop to the run.
        """
        return not self.closed and self.callbacks[0] is callback

    def set_scope(self, scope: Mapping[str, nn.Parameter]) -> None:
        """Make only these parameters trainable, and copy their current values as the reference values."""
        check_stored(scope)
        self.scope: dict[str, nn.Parameter] = dict(scope)
        self.frozen_outside: bool = True
        in_scope = {id(p) for p in scope.values()}
        for parameter in self.requires_grad_before:
            parameter.requires_grad_(id(parameter) in in_scope)
            if id(parameter) not in in_scope:
                # An optimizer would change the parameter if its old gradient remained, even if the gradient is zero.
                parameter.grad = None
        if self.full_precision:
            self.masters = FullPrecision(self.root, self.scope)
        self.reference: dict[str, Tensor] = snapshot(self.scope)
        self.steps.integrity.record_frozen()

    def attach(self, callback: Any) -> None:
        """Attach one callback to the run, after all callbacks have been prepared."""
        if not self.has_started:
            with agreeing_processes(self):
                self._begin()
        if not self.has_attached(callback):
            self._attached.add(id(callback))
            reshard(self.root)  # The previous callback may have run the model.
            with reported_by(type(callback).__name__):
                callback.attach(self)
                if callback in self._saved_states:
                    callback.load_state(self._saved_states.pop(callback))

    def _begin(self) -> None:
        check_not_interrupted(self)
        check_not_gated_before(self)
        check_requirements(self.callbacks)
        follow_strategy(self)
        follow_dtype(self)
        if self.host.resumed:
            self._saved_states = restore(self, self.host.saved_state())
        elif not is_distributed():
            # In a distributed run, weights may differ here, because DDP may have copied the weights of process 0.
            check_unchanged(self.scope, self.reference)
        if not self.reference and self.needs_reference:
            with self.reference_model():
                self.reference = snapshot(self.scope)

    def after_step(self) -> None:
        """Call ``after_step`` of every callback, after an optimizer step."""
        for callback in list(self.callbacks):
            with reported_by(type(callback).__name__):
                callback.after_step(self)

    def finish(self, callback: Any) -> None:
        """Record that training is over for this callback.

        When training is over for the last callback, call ``finish`` of every callback and close the run.
        """
        if self.closed or not self.has_attached(callback):
            return
        self._finished.add(id(callback))
        if self._finished < self._attached:
            return
        try:
            self.steps.finish()
        except BaseException:
            self.close()
            raise
        self._complete = True
        self._end_full_precision()
        self.steps.integrity.end()
        for attached in filter(self.has_attached, list(self.callbacks)):
            with reported_by(type(attached).__name__):
                attached.finish(self)
        self.close()

    def close(self) -> None:
        """End the run: remove its hooks from the model, and restore every ``requires_grad`` flag."""
        if self.closed:
            return
        self.closed = True
        self._end_full_precision()
        errors: list[Exception] = []
        for callback in self.callbacks:
            try:
                with reported_by(type(callback).__name__):
                    callback.detach(self)
            except Exception as error:
                # The other callbacks have hooks to remove, too.
                errors.append(error)
        for part in (self.steps, self._loss_head, self._head, self.packing, self.zero):
            if part is not None:
                part.remove()
        for parameter, requires_grad in self.requires_grad_before.items():
            parameter.requires_grad_(requires_grad)
        self.root.__dict__.pop(_ATTRIBUTE, None)
        if self.step and not self._complete:
            mark_interrupted(self)
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """End training after the current optimizer step."""
        self.stopped = True
        self.host.stop()

    def state(self) -> dict[str, Any]:
        """Return the checkpoint state that lets a resumed run continue this edit."""
        return checkpoint_state(self, self.steps.integrity.frozen_checksums())

    @torch.no_grad()
    def _end_full_precision(self) -> None:
        """Round parameters that were trained in fp32 to their original dtype, and constrain the rounded values."""
        masters, self.masters = self.masters, None
        if masters is None or not masters.dtypes:
            return
        masters.remove()
        # This conversion is exact: the values were widened from that dtype.
        self.reference |= {name: self.reference[name].to(dtype) for name, dtype in masters.dtypes.items()}
        if self.step:
            # No optimizer has just stepped, so constraints that depend on the learning rate must not act again.
            self.steps.learning_rates = {}
            self.steps.apply_constraints()

    # -- what callbacks use

    def causal_model(self) -> nn.Module:
        """Return the causal language model in ``root``.

        Raises:
            EditError: ``root`` contains no causal language model, or the model is an encoder-decoder.
        """
        model = self.language_model
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if model is None or encoder_decoder:
            reason = "is an encoder-decoder" if encoder_decoder else "has no language-model head"
            raise EditError(
                f"the model must be a causal language model, got {type(model or self.root).__name__}, which {reason}; "
                "load a model with AutoModelForCausalLM, or remove this callback."
            )
        return model

    def head(self) -> OutputHead:
        """Return the model's output head. The first call verifies that the head reproduces the model's logits."""
        if self._head is None:
            head = OutputHead(self.causal_model())
            try:
                head.verify(self.host.forward_context())
            except BaseException:
                head.remove()
                raise
            self._head = head
        return self._head

    def loss_head(self) -> LossHead:
        """Return the object that replaces the model's loss until the run ends. The first call creates it."""
        if self._loss_head is None:
            host = self.host
            self._loss_head = LossHead(self.head(), shares=host.summed_micro_batches, full_logits=host.reads_logits)
        return self._loss_head

    @property
    def reads_hidden_states(self) -> bool:
        """Whether the callbacks read the hidden states of the current forward pass instead of its logits."""
        return self._head is not None and self._head.is_capturing

    def reference_head(self) -> Callable[[Tensor], Tensor] | None:
        """Return the output head of the unedited model, as a function from hidden states to logits.

        The result is None if the head is not in scope, because the edit then does not change the head.
        """
        # During the forward pass, FSDP2 replaces parameters by gathered copies, which are not the scoped parameters.
        reshard(self.root)
        head = self.head()
        names_in_head = {id(p): name for name, p in head.module.named_parameters()}
        in_scope = {name: p for name, p in self.scope.items() if id(p) in names_in_head}
        if not in_scope:
            return None
        if isinstance(head.module, FSDPModule):
            raise EditError(
                "the output head is in scope and fully_shard was applied to it, so its weights from before the edit "
                "cannot be used; remove the head from the scope, or apply fully_shard to the model but not to its head."
            )
        if not self.reference:
            with self.reference_model():
                reference = snapshot(in_scope)
        else:
            reference = self.reference
        values = {names_in_head[id(p)]: full_tensor(reference[name]) for name, p in in_scope.items()}
        return lambda hidden: torch.func.functional_call(head.module, values, (hidden,))

    @contextmanager
    def reference_model(self) -> Iterator[None]:
        """Context manager: inside the ``with`` block, the scoped parameters have their values from before the edit."""
        if self.reference:
            reshard(self.root)
            with temporary_values(self.scope, self.reference):
                yield
                reshard(self.root)
        elif self.step or self.host.resumed:
            raise EditError(
                "the weights from before the edit are needed, but training has begun or was resumed, and no copy of "
                "these weights exists; add ParameterScope, which keeps a copy, and start again from the unedited model."
            )
        else:
            yield

    def tokenizer(self, tokenizer: Any | None = None) -> Any:
        """Return the given tokenizer, or else the tokenizer of the training loop or of the model.

        Args:
            tokenizer: a tokenizer, a name or a path. None selects the tokenizer of the training loop, or, if the loop
                has none, the tokenizer saved with the model.

        Raises:
            EditError: no tokenizer can be loaded, or the value is not a tokenizer, a name or a path.
        """
        return find_tokenizer(tokenizer if tokenizer is not None else self.host.tokenizer(), self.model)

    def collect(self) -> dict[str, float]:
        """Collect and publish the metrics that the callbacks have measured since the last log event."""
        gathered: dict[str, float] = {}
        for callback in self.callbacks:
            for key, value in callback.metrics(self).items():
                # A second callback of the same class logs under the same key with "#2" appended.
                while key in gathered:
                    stem, _, number = key.partition("#")
                    key = f"{stem}#{int(number or 1) + 1}"
                gathered[key] = value
        self.publish(gathered)
        return gathered
