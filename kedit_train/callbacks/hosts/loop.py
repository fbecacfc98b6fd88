"""Fabric and plain loops: the same callbacks around a loop that somebody wrote by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from kedit_train.core.host import Host
from kedit_train.core.processes import is_distributed, rank
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


class LoopHost(Host):
    """A hand-written loop. What would be logged is handed to ``on_log`` and kept in ``history``."""

    def __init__(
        self,
        tokenizer: Any = None,
        on_log: Any = None,
        log_every_n_steps: int = 10,
        edits: Any = None,
        epoch_steps: int | None = None,
    ) -> None:
        super().__init__(self)
        self._tokenizer, self.on_log, self.log_every_n_steps = tokenizer, on_log, log_every_n_steps
        self._edits, self._epoch_steps = edits, epoch_steps
        self.history: list[dict[str, float]] = []
        self.tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = {}
        self.run: EditRun | None = None
        # Parameters with the very gradients that the penalties of this step have left.
        self.pulled: list[tuple[nn.Parameter, Any]] = []

    releases = False

    def unannounced(self) -> str:
        return "call edit.before_step() before the forward pass of every optimizer step: this one came unannounced"

    @property
    def is_main(self) -> bool:
        return rank() == 0

    def refused(self) -> str | None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and not is_distributed():
            return (
                f"{launched} processes were started and none knows of the others, so each would train for itself (let "
                "fabric.launch() or torch.distributed.init_process_group() come first)"
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

    def check_gradients(self) -> str | None:
        # Several processes: DDP may have moved them into buckets of its own.
        if not is_distributed() and any(p.grad is not grad for p, grad in self.pulled):
            return (
                "the gradient of the edit's penalties is gone: zero_grad() came between edit.before_step() and "
                "optimizer.step(); call it before edit.before_step()"
            )
        return None

    def stepped(self, run: EditRun) -> None:
        self.pulled = []
        run.after_step()
        if run.step % self.log_every_n_steps == 0:
            metrics = run.collect()
            if metrics:
                self.log(metrics)


class Editing:
    """The handle that :func:`editing` yields."""

    def __init__(self, run: EditRun, host: LoopHost) -> None:
        self.run, self._host = run, host

    @property
    def history(self) -> list[dict[str, float]]:
        """Every row of metrics so far, each with its ``step``."""
        return self._host.history

    @property
    def should_stop(self) -> bool:
        """A callback wants training to end."""
        return self.run.stopped

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer is to train."""
        return list(self.run.scope.values())

    def before_step(self, scaler: Any = None) -> None:
        """Call once before the first forward pass of every optimizer step, after ``zero_grad()``.

        Penalties leave their gradients here, which the loop's own are added to.

        Args:
            scaler: the loop's ``torch.amp.GradScaler``, where it has one.
        """
        run = self.run
        if run.closed:
            raise EditError(
                "this edit is over: its editing() block has ended, or another trainer or editing() has taken the model "
                "or one of its callbacks; begin a new one"
            )
        for callback in run.callbacks:
            run.attach(callback)
        if not self._pending():
            # Nothing of it is there any more: a step that was left out (a gradient scaler, a bad batch) ended with
            # zero_grad().
            run.steps.begin()
        penalty = run.steps.penalty()
        if penalty is not None:
            (penalty if scaler is None else scaler.scale(penalty)).backward()
            self._host.pulled = [(p, p.grad) for p in run.scope.values() if p.grad is not None]

    def _pending(self) -> bool:
        """Whether the gradients of an announced step that was not taken are still there."""
        pulled = self._host.pulled
        return bool(pulled) and all(p.grad is grad and bool(grad.any()) for p, grad in pulled)


@contextmanager
def editing(
    model: nn.Module,
    callbacks: Sequence[Any],
    *,
    tokenizer: Any = None,
    on_log: Any = None,
    log_every_n_steps: int = 10,
    edits: Any = None,
    epoch_steps: int | None = None,
) -> Iterator[Editing]:
    """Turn a hand-written loop into an edit.

    Enter before the optimizer is created (and before ``fabric.setup``), with the bare model; call ``before_step()``
    before each optimizer step; leave when training is over.

    Args:
        model: a module; callbacks that need a language model find it within.
        callbacks: any of ``kedit_train.callbacks``, in any order.
        tokenizer: for callbacks that read text; by default the one saved where the model came from.
        on_log: called with ``(metrics, step)``; ``wandb.log`` or ``fabric.log_dict`` fit.
        edits: what the loop trains, for callbacks that ask what is edited and were not told themselves.
        epoch_steps: optimizer steps of an epoch, for ``StopWhenEdited``, whose rules may look at a whole one.

    Example:
        >>> with editing(model, [ParameterScope(layers=0.5), TokenSmoothing()]) as edit:
        ...     optimizer = torch.optim.AdamW(edit.parameters())
        ...     for batch in batches:
        ...         edit.before_step()
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    if not isinstance(model, nn.Module):
        raise EditError(f"editing() takes a loaded model, not {model!r}; load it with AutoModelForCausalLM")
    if not callbacks:
        raise EditError("editing(): the list of callbacks is empty; nothing would be constrained")
    host = LoopHost(tokenizer, on_log, log_every_n_steps, edits, epoch_steps)
    run = None
    try:
        for callback in callbacks:
            run = callback.run = host.run = EditRun.join(model, callback, host)
        assert run is not None
        yield Editing(run, host)
        for callback in list(run.callbacks):
            run.finish(callback)
    finally:
        if run is not None:
            run.close()
