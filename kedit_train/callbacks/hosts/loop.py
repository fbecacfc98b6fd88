"""LoopHost and ``editing``: the host for hand-written training loops, with or without Fabric."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.callbacks.hosts.editing_arguments import check_editing
from kedit_train.core.checksums import checksum
from kedit_train.core.host import Host
from kedit_train.core.processes import is_distributed, rank
from kedit_train.core.resume import check_scope, check_state, has_other_weights
from kedit_train.core.run import EditRun
from kedit_train.core.strategy import follow_strategy
from kedit_train.data.chat_format import PromptFormat, read_format
from kedit_train.errors import EditError


class LoopHost(Host):
    """The host for a hand-written training loop. Its arguments are explained in :func:`editing`.

    Attributes:
        history: every row of metrics that was logged, each with its ``step``.
        tables: a dict from the key of each logged table to its ``(columns, rows)``.
        run: the run that this loop drives.
        prompt_format: the prompt format of the training examples, or None if it is unknown.
        penalty_gradients: pairs (parameter, gradient), recorded directly after the backward pass of the penalties.
    """

    # If an optimizer steps without before_step(), the error ends the ``with editing(...)`` block, which closes the run.
    releases_model = False

    def __init__(
        self,
        tokenizer: Any = None,
        on_log: Any = None,
        log_every_n_steps: int = 10,
        edits: Any = None,
        epoch_steps: int | None = None,
        prompt_format: Any = None,
    ) -> None:
        super().__init__(self)
        self._tokenizer, self.on_log, self.log_every_n_steps = tokenizer, on_log, log_every_n_steps
        self._edits, self._epoch_steps = edits, epoch_steps
        self.history: list[dict[str, float]] = []
        self.tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = {}
        self.run: EditRun | None = None
        self.prompt_format: PromptFormat | None = read_format(prompt_format)
        self.penalty_gradients: list[tuple[nn.Parameter, Any]] = []
        self._watches: list[Any] = []
        # For each gradient of the penalties: whether its values have changed before the backward pass of the loss.
        self._changed: list[Tensor] = []
        # The state of the edit from a checkpoint, if the loop has resumed an edit.
        self.checkpoint_state: dict[str, Any] | None = None

    @property
    def resumed(self) -> bool:
        return self.checkpoint_state is not None

    def saved_state(self) -> dict[str, Any] | None:
        return self.checkpoint_state

    def unannounced_step_error(self) -> str:
        return (
            "an optimizer stepped without edit.before_step(); call edit.before_step() before the first forward pass of "
            "every optimizer step."
        )

    @property
    def is_main(self) -> bool:
        return rank() == 0

    def is_editing(self, run: EditRun) -> bool:
        return True  # The run is closed when its block ends, also after an error.

    def unsupported_reason(self) -> str | None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and not is_distributed():
            return (
                f"{launched} processes were started but are not connected, so each process trains its own model, "
                "because neither fabric.launch() nor torch.distributed.init_process_group() was called"
            )
        return None

    @property
    def epoch_steps(self) -> int | None:
        return self._epoch_steps

    def tokenizer(self) -> Any | None:
        return self._tokenizer

    def edits(self) -> Any | None:
        return self._edits

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        step = self.run.step if self.run else 0
        self.history.append({"step": step, **metrics})
        if self.on_log is not None:
            self.on_log(dict(metrics), step)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[key] = (columns, rows)

    def gradient_error(self) -> str | None:
        # This check needs a single process: DDP may replace the gradients by views into its own buckets.
        if not is_distributed() and (
            any(p.grad is not grad for p, grad in self.penalty_gradients)
            or (self._changed and bool(torch.stack(self._changed).any()))
        ):
            return (
                "the gradients of the penalties were deleted: zero_grad() was called between edit.before_step() and "
                "optimizer.step(); call zero_grad() before edit.before_step()."
            )
        return None

    def watch_penalties(self, run: EditRun) -> None:
        """Record the gradients of the penalties, so that :meth:`gradient_error` can detect a deleted gradient."""
        self.forget_penalties()
        self.penalty_gradients = [(p, p.grad) for p in run.scope.values() if p.grad is not None]
        for parameter, gradient in self.penalty_gradients:
            self._watch(parameter, checksum(gradient))

    def forget_penalties(self) -> None:
        """Stop watching the gradients of the penalties."""
        for handle in self._watches:
            handle.remove()
        self.penalty_gradients, self._watches, self._changed = [], [], []

    def _watch(self, parameter: nn.Parameter, before: Tensor) -> None:
        # A hook of a parameter is called before the gradient of the loss is added to parameter.grad. The gradient may
        # have been set to zero in place. The tensor object is then the same, so the values are compared.
        def check(_: Tensor) -> None:
            handle.remove()
            if parameter.grad is not None:
                self._changed.append(checksum(parameter.grad) != before)

        handle = parameter.register_hook(check)
        self._watches.append(handle)

    def after_optimizer_step(self, run: EditRun) -> None:
        self.forget_penalties()
        run.after_step()
        if run.step % self.log_every_n_steps == 0:
            metrics = run.collect()
            if metrics:
                self.log(metrics)


class Editing:
    """The object that :func:`editing` yields to the training loop.

    Attributes:
        run: the :class:`~kedit_train.core.run.EditRun`.
    """

    def __init__(self, run: EditRun, host: LoopHost) -> None:
        self.run = run
        self._host = host

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows of metrics logged so far, each with its ``step``."""
        return self._host.history

    @property
    def should_stop(self) -> bool:
        """Whether a callback has asked to end training."""
        return self.run.stopped

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters in the scope, to pass to the optimizer."""
        return list(self.run.scope.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the edit for a checkpoint: step, weights before the edit and callback states.

        Save the result with ``torch.save`` together with the states of the model and the optimizer. The result contains
        only tensors and plain values, so ``torch.load`` can read it with ``weights_only=True``.

        Raises:
            EditError: the first step has not begun, or the edit is over.
        """
        run = self.run
        if run.closed or not run.has_started:
            when = "is over" if run.closed else "has not begun (it begins with the first edit.before_step())"
            raise EditError(f"this edit {when}, so it has no state now; call edit.state_dict() between two steps.")
        return run.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an interrupted edit. Call this method before the first ``before_step()``.

        Before the call, load the weights that were saved together with ``state``, inside the ``editing`` block.

        Args:
            state: the result of :meth:`state_dict`.

        Raises:
            EditError: the edit has begun, or the model has other weights than those saved together with ``state``.
        """
        run = self.run
        if run.has_started:
            raise EditError("the edit has begun; call edit.load_state_dict() before the first edit.before_step().")
        follow_strategy(run)  # fully_shard may have replaced the parameters.
        check_state(state)
        check_scope(run, state)
        if has_other_weights(run, state):
            raise EditError(
                "the model must have the weights of the checkpoint, got other weights in the scope; call "
                "model.load_state_dict() before edit.load_state_dict(), use the ParameterScope of the saved run, and "
                "save both states at the same step, inside editing()."
            )
        self._host.checkpoint_state = dict(state)

    def before_step(self, scaler: Any = None) -> None:
        """Begin an optimizer step. Call this after ``zero_grad()`` and before the first forward pass of the step.

        This method computes the gradients of the penalties. ``backward()`` later adds the gradients of the loss.

        Args:
            scaler: the loop's ``torch.amp.GradScaler``, if it uses one.

        Raises:
            EditError: the ``editing`` block has ended, or the callbacks cannot work together.
        """
        run = self.run
        if run.closed:
            raise EditError(
                "this edit is over: its editing() block has ended, or another trainer or editing() block has taken "
                "over one of the callbacks; start a new editing() block."
            )
        for callback in run.callbacks:
            run.attach(callback)
        # DeepSpeed takes every step that has begun, and has no gradients of penalties before the backward pass.
        if run.zero is None and not self._is_pending():
            # The previous step was taken or skipped (for example by a gradient scaler).
            run.steps.begin(scaler)
        if (penalty := run.steps.penalty()) is not None:
            run.backward(penalty if scaler is None else scaler.scale(penalty))
            if run.zero is None:
                self._host.watch_penalties(run)

    def _is_pending(self) -> bool:
        """Return whether the current step still waits for ``optimizer.step()``."""
        gradients = self._host.penalty_gradients
        return bool(gradients) and all(p.grad is grad and bool(grad.any()) for p, grad in gradients)


class EditingBlock(AbstractContextManager[Editing]):
    """The result of :func:`editing`: a context manager that can be entered once.

    Args:
        block: the context manager that begins and ends the edit.
    """

    def __init__(self, block: AbstractContextManager[Editing]) -> None:
        self._block, self._entered = block, False

    def __enter__(self) -> Editing:
        if self._entered:
            raise EditError("an editing() block can be entered only once; call editing() again.", component="editing")
        self._entered = True
        return self._block.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._block.__exit__(*error)


def editing(
    model: nn.Module,
    callbacks: Sequence[Any],
    *,
    tokenizer: Any = None,
    on_log: Any = None,
    log_every_n_steps: int = 10,
    edits: Any = None,
    epoch_steps: int | None = None,
    prompt_format: Any = None,
) -> EditingBlock:
    """Turn a hand-written training loop into an edit.

    Enter the ``with`` block before you create the optimizer, and before ``fabric.setup`` or DDP wraps the model. Call
    ``edit.before_step()`` before every optimizer step. After the block, the model is an ordinary module again.

    Args:
        model: the module to train. A language model may also be a submodule of this module.
        callbacks: instances from ``kedit_train.callbacks``, in any order.
        tokenizer: tokenizer for callbacks that read text. None uses the tokenizer that is saved with the model.
        on_log: function that receives ``(metrics, step)``, for example ``wandb.log`` or ``fabric.log_dict``.
        log_every_n_steps: number of optimizer steps between two log events.
        edits: the edits that the loop trains on, for callbacks that were created without edits.
        epoch_steps: number of optimizer steps in one epoch. ``StopWhenEdited`` needs it for its setting "epoch".
        prompt_format: the prompt format of the training examples: "plain", "chat", "question" or a ``ChatFormat``. None
            means that the format is unknown. Callbacks then assume plain prompts.

    Returns:
        A context manager. Its ``with`` block receives an :class:`Editing` with ``parameters()``, ``before_step()``,
        ``should_stop`` and ``history``.

    Raises:
        EditError: ``model`` is not a module, ``callbacks`` is not a list of at least one callback, another argument has
            a wrong type or is not positive, or a callback cannot work with the model.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import NormBall, ParameterScope
        >>> model, tokenizer = world.load()
        >>> edit_0 = EditDataset.load("world", limit=1)[0]
        >>> ids = torch.tensor([tokenizer(f"{edit_0.prompt} {edit_0.target}")["input_ids"]])
        >>> callbacks = [ParameterScope(layers=0.5, modules="mlp"), NormBall(fraction=0.05)]
        >>> with editing(model, callbacks, tokenizer=tokenizer) as edit:
        ...     optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-3)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         edit.before_step()
        ...         model(input_ids=ids, labels=ids).loss.backward()
        ...         optimizer.step()
        >>> edit.run.step
        3
    """
    options = (tokenizer, on_log, log_every_n_steps, edits, epoch_steps, prompt_format)
    return EditingBlock(_edit(model, callbacks, options))


@contextmanager
def _edit(model: nn.Module, callbacks: Sequence[Any], options: tuple[Any, ...]) -> Iterator[Editing]:
    """Begin an edit, yield its :class:`Editing`, and end the edit. ``options`` are the arguments of ``LoopHost``."""
    check_editing(model, callbacks, *options)
    host = LoopHost(*options)
    run = None
    try:
        for callback in callbacks:
            run = callback.run = host.run = EditRun.join(model, callback, host)
        assert run is not None
        yield Editing(run, host)
        if host.resumed and not run.closed:
            # The edit usually begins in the first step. A loop that was resumed from its last checkpoint has no step
            # left, so the edit begins here.
            for callback in run.callbacks:
                run.attach(callback)
        for callback in list(run.callbacks):
            run.finish(callback)
    finally:
        if run is not None:
            run.close()
