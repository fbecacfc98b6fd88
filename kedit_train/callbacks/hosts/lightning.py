"""``lightning.pytorch.Trainer``: which of its events is which moment of an edit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from kedit_train.core.host import Host
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


class LightningHost(Host):
    """A Lightning trainer and the module that it fits."""

    name = "lightning"
    # Through the loss of a backward pass, so not where a module steps without one.
    announces_steps = False
    releases = False
    # Automatic optimization; on_before_optimizer_step comes from within.
    steps_with_closures = True

    def unannounced(self) -> str:
        return "an optimizer step without self.manual_backward(loss): the edit's penalties join the loss there; call it"

    def __init__(self, trainer: Any, module: Any) -> None:
        super().__init__(trainer)
        self.trainer, self.module = trainer, module
        self.seen = 0
        self.loading, self.loaded = False, dict[str, Any]()
        self._defined = False

    @property
    def resumed(self) -> bool:
        # Not by global_step: the same trainer may fit on, without a checkpoint, from the weights that are there.
        return self.loading

    def saved_state(self) -> dict[str, Any] | None:
        return self.loaded or None

    @property
    def is_main(self) -> bool:
        return self.trainer.is_global_zero

    @property
    def steps(self) -> int | None:
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if steps != float("inf") else None

    @property
    def epoch_steps(self) -> int | None:
        # As trainer.estimated_stepping_batches does: asked before the first epoch, when no data is there yet.
        self.trainer.fit_loop.setup_data()
        batches = self.trainer.num_training_batches
        return math.ceil(batches / self.trainer.accumulate_grad_batches) if batches != float("inf") else None

    def tokenizer(self) -> Any | None:
        holders: list[Any] = [self.module, getattr(self.trainer, "datamodule", None)]
        return next((t for h in holders if (t := getattr(h, "tokenizer", None)) is not None), None)

    def edits(self) -> Any | None:
        return getattr(getattr(self.trainer, "datamodule", None), "edits", None)

    def refused(self) -> str | None:
        launched, known = int(os.environ.get("WORLD_SIZE", "1")), self.trainer.world_size
        if known < launched:
            return (
                f"{launched} processes were started and the trainer has devices={known}, so each would train for itself"
            )
        if any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):
            return "WeightAveraging writes averages over the weights, frozen ones as well, and rounds them"
        name = type(self.trainer.strategy).__name__
        return f"{name} steps on flat copies of the weights" if name.startswith("DeepSpeed") else None

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.trainer.precision_plugin.forward_context()

    def scale(self) -> float:
        """What the mixed-precision plugin has multiplied the loss by."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        # Lightning numbers the row of the n-th step n - 1. Its own count moves on only after callbacks have seen the
        # batch; when training has ended it has moved on.
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped - (1 if last else 0)
        for logger in self.trainer.loggers if self.is_main else ():
            if not self._defined and hasattr(logger.experiment, "define_metric"):
                logger.experiment.define_metric("edit/*", step_metric="trainer/global_step", step_sync=True)
            logger.log_metrics(dict(metrics), step=max(0, step))
        self._defined = True
        for key, value in metrics.items():
            if last:
                self.trainer.callback_metrics[key] = _tensor(value)
            else:
                short = key in ("edit/reliability", "edit/locality", "edit/generality", "edit/locality/kl")
                self.module.log(key, value, prog_bar=short, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        for logger in self.trainer.loggers if self.is_main else ():
            if hasattr(logger, "log_table"):
                logger.log_table(key=key, columns=list(columns), data=[list(row) for row in rows])

    def wandb_run(self) -> Any | None:
        loggers = self.trainer.loggers if self.is_main else ()
        return next((logger.experiment for logger in loggers if isinstance(logger, WandbLogger)), None)

    def stop(self) -> None:
        self.trainer.should_stop = True


def _tensor(value: float) -> Tensor:
    import torch

    return torch.tensor(float(value))


KEY = "kedit_train"


class LightningEvents(Callback):
    """Events of ``lightning.pytorch.Trainer``, each passed on once: the first callback on the list drives the run."""

    run: Any = None

    def _leading(self, trainer: Any) -> EditRun | None:
        run = self.run
        return run if run is not None and not run.closed and run.host.owner is trainer and run.leads(self) else None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Before configure_optimizers and before the strategy wraps the module.
        if stage == "fit":
            self.run = EditRun.join(pl_module, self, LightningHost(trainer, pl_module))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        run = self._leading(trainer)
        if run:
            for callback in run.callbacks:
                run.attach(callback)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Not state_dict(), for which no two callbacks of a kind may be there.
        run = self._leading(trainer)
        if run:
            checkpoint[KEY] = run.state()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Between setup and on_fit_start, where the run takes it up.
        if self.run is not None:
            self.run.host.loading, self.run.host.loaded = True, checkpoint.get(KEY, {})

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # The first micro-batch of a step; the last one may have been left out by a gradient scaler.
        run = self._leading(trainer)
        if run:
            run.steps.begin()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        # Added to the loss in place: a backward pass of its own would bypass DDP's reduction and let ranks diverge.
        # Once per optimizer step and undivided, although the loss has been divided by accumulate_grad_batches.
        run = self._leading(trainer)
        penalty = run.steps.penalty() if run else None
        if run and penalty is not None:
            made_by: Any = loss.grad_fn
            if getattr(made_by, "_saved_result", None) is not None:
                raise EditError(
                    f"the penalties are added to the loss in place, which {made_by.name()} does not allow: give "
                    "manual_backward() loss * 1.0"
                )
            loss.add_(penalty.to(loss.device) * run.host.scale())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        run = self._leading(trainer)
        if run:
            run.steps.before(getattr(optimizer, "optimizer", optimizer))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        run = self._leading(trainer)
        if run is None:
            return
        host: Any = run.host
        if run.step > host.seen:
            host.seen = run.step
            run.after_step()
            if trainer.log_every_n_steps and run.step % trainer.log_every_n_steps == 0:
                metrics = run.collect()
                if metrics:
                    host.log(metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.run is not None:
            self.run.finish(self)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.run is not None:
            self.run.close()
