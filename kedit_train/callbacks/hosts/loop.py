"""Fabric and plain loops: the same callbacks around a loop that somebody wrote by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from kedit_train.core.host import Host
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


class LoopHost(Host):
    """A hand-written loop. What would be logged is handed to ``on_log`` and kept in ``history``."""

    def __init__(self, tokenizer: Any = None, on_log: Any = None, log_every_n_steps: int = 10) -> None:
        super().__init__(self)
        self._tokenizer, self.on_log, self.log_every_n_steps = tokenizer, on_log, log_every_n_steps
        self.history: list[dict[str, float]] = []
        self.tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = {}
        self.run: EditRun | None = None

    releases = False

    def unannounced(self) -> str:
        return "call edit.before_step() before the forward pass of every optimizer step: this one came unannounced"

    def tokenizer(self) -> Any | None:
        return self._tokenizer

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        step = self.run.step if self.run else 0
        self.history.append({"step": step, **metrics})
        if self.on_log is not None:
            self.on_log(dict(metrics), step)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[key] = (columns, rows)

    def stepped(self, run: EditRun) -> None:
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
        """Call once before the first forward pass of every optimizer step, with gradients cleared.

        Args:
            scaler: the loop's ``torch.amp.GradScaler``, where it has one.
        """
        for callback in self.run.callbacks:
            self.run.attach(callback)
        penalty = self.run.steps.penalty()
        if penalty is not None:
            (penalty if scaler is None else scaler.scale(penalty)).backward()


@contextmanager
def editing(
    model: nn.Module,
    callbacks: Sequence[Any],
    *,
    tokenizer: Any = None,
    on_log: Any = None,
    log_every_n_steps: int = 10,
) -> Iterator[Editing]:
    """Turn a hand-written loop into an edit.

    Enter before the optimizer is created (and before ``fabric.setup``), with the bare model; call ``before_step()``
    before each optimizer step; leave when training is over.

    Args:
        model: a module; callbacks that need a language model find it within.
        callbacks: any of ``kedit_train.callbacks``, in any order.
        tokenizer: for callbacks that read text; by default the one saved where the model came from.
        on_log: called with ``(metrics, step)``; ``wandb.log`` or ``fabric.log_dict`` fit.

    Example:
        >>> with editing(model, [ParameterScope(layers=0.5), TokenSmoothing()]) as edit:
        ...     optimizer = torch.optim.AdamW(edit.parameters())
        ...     for batch in batches:
        ...         edit.before_step()
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    if not callbacks:
        raise EditError("editing(): the list of callbacks is empty; nothing would be constrained")
    host = LoopHost(tokenizer, on_log, log_every_n_steps)
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
