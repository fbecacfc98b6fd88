"""LightningHost: translate the events of ``lightning.pytorch.Trainer`` to the steps of an edit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kedit_train.callbacks.hosts.lightning_base import LightningCallback
from kedit_train.core.after_end import check_after_end
from kedit_train.core.host import Host
from kedit_train.core.resume import with_current_weights
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


class LightningHost(Host):
    """The host for a Lightning trainer and the module that it trains.

    Args:
        trainer: the ``lightning.pytorch.Trainer``.
        module: its LightningModule.

    Attributes:
        last_step: number of the last optimizer step that was reported to the callbacks.
        checkpoint_state: the state of the edit in the checkpoint from which the trainer resumed. None if the trainer
            did not resume.
        has_loss: whether a backward pass has begun since the gradients were last deleted.
        shape_check: handle of the hook that :meth:`check_loaded_shapes` has registered.
    """

    name = "lightning"
    # run.steps.penalty() is called before each backward pass. With manual optimization, an optimizer may step without a
    # backward pass. Such a step is an error only if a callback has a penalty.
    announces_every_step = False
    # After an error in an optimizer step, Lightning calls on_exception, which closes the run.
    releases_model = False
    # Automatic optimization passes a closure to the optimizer. The closure calls on_before_optimizer_step.
    uses_closures = True

    def __init__(self, trainer: Any, module: Any) -> None:
        super().__init__(trainer)
        self.trainer, self.module = trainer, module
        self.last_step, self.has_loss = 0, False
        self.checkpoint_state: dict[str, Any] | None = None
        self._metrics_defined = False
        self._clip_value: float | None = None
        self.shape_check: Any = None

    def unannounced_step_error(self) -> str:
        return (
            "an optimizer stepped without self.manual_backward(loss), which adds the penalties of this edit to the "
            "loss; call self.manual_backward(loss) before each step."
        )

    @property
    def resumed(self) -> bool:
        # global_step is not enough: in a second fit() of the same trainer, it is above 0 although nothing is resumed.
        return self.checkpoint_state is not None

    def saved_state(self) -> dict[str, Any] | None:
        return self.checkpoint_state or None

    @property
    def is_main(self) -> bool:
        return self.trainer.is_global_zero

    @property
    def steps(self) -> int | None:
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if steps != float("inf") else None

    @property
    def epoch_steps(self) -> int | None:
        # Lightning sets up the data only when the first epoch begins. The number of batches is needed earlier, so the
        # data is set up here, as in trainer.estimated_stepping_batches.
        self.trainer.fit_loop.setup_data()
        batches = self.trainer.num_training_batches
        return math.ceil(batches / self.trainer.accumulate_grad_batches) if batches != float("inf") else None

    def tokenizer(self) -> Any | None:
        holders: list[Any] = [self.module, getattr(self.trainer, "datamodule", None)]
        return next((t for h in holders if (t := getattr(h, "tokenizer", None)) is not None), None)

    def edits(self) -> Any | None:
        return getattr(getattr(self.trainer, "datamodule", None), "edits", None)

    def unsupported_reason(self) -> str | None:
        from lightning.pytorch import callbacks

        launched, used = int(os.environ.get("WORLD_SIZE", "1")), self.trainer.world_size
        if used < launched:
            return (
                f"{launched} processes were started but the trainer uses {used}, so each process trains its own model"
            )
        # Lightning has had WeightAveraging since 2.6.
        names = ("StochasticWeightAveraging", "WeightAveraging")
        averages = tuple(getattr(callbacks, name) for name in names if hasattr(callbacks, name))
        averaging = next((c for c in self.trainer.callbacks if isinstance(c, averages)), None)
        if averaging is not None:
            return f"{type(averaging).__name__} replaces the weights by averages, which may break the constraints"
        name = type(self.trainer.strategy).__name__
        return f"{name} updates flattened copies of the weights" if name.startswith("DeepSpeed") else None

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.trainer.precision_plugin.forward_context()

    def disable_clipping(self) -> tuple[str, float] | None:
        value = self.trainer.gradient_clip_val
        if not value:
            return None
        # Lightning reads this attribute in every step.
        self._clip_value, self.trainer.gradient_clip_val = value, None
        return "gradient_clip_val", value

    def restore_clipping(self) -> None:
        if self._clip_value is not None:
            self.trainer.gradient_clip_val, self._clip_value = self._clip_value, None

    def loss_scale(self) -> float:
        """Return the factor that the mixed-precision plugin has applied to the loss."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        # Lightning logs optimizer step n under the number n - 1. During training, Lightning's counter has this value,
        # because the counter is incremented after the callbacks have run. When training has ended, the counter is
        # higher by one.
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped - (1 if last else 0)
        for logger in self.trainer.loggers if self.is_main else ():
            experiment: Any = None if self._metrics_defined else getattr(logger, "experiment", None)
            if hasattr(experiment, "define_metric"):
                experiment.define_metric("edit/*", step_metric="trainer/global_step", step_sync=True)
            logger.log_metrics(dict(metrics), step=max(0, step))
        self._metrics_defined = True
        for key, value in metrics.items():
            if last:
                self.trainer.callback_metrics[key] = torch.tensor(float(value))
            else:
                shown = key in ("edit/reliability", "edit/locality", "edit/generality", "edit/locality/kl")
                self.module.log(key, value, prog_bar=shown, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        for logger in self.trainer.loggers if self.is_main else ():
            if hasattr(logger, "log_table"):
                logger.log_table(key=key, columns=list(columns), data=[list(row) for row in rows])

    def wandb_run(self) -> Any | None:
        from lightning.pytorch.loggers import WandbLogger

        loggers = self.trainer.loggers if self.is_main else ()
        return next((logger.experiment for logger in loggers if isinstance(logger, WandbLogger)), None)

    def stop(self) -> None:
        self.trainer.should_stop = True

    def show_progress(self, line: str) -> None:
        # Lightning's progress bar shows nothing if the output goes to a file.
        if self.is_main and self.trainer.progress_bar_callback is not None and not sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)

    def check_loaded_shapes(self) -> None:
        """Check the weight shapes in every checkpoint that Lightning loads, until :meth:`end_shape_check` is called."""
        if self.shape_check is None:
            self.shape_check = self.module.register_load_state_dict_pre_hook(_check_shapes)

    def end_shape_check(self) -> None:
        """Stop checking shapes. Call this method after Lightning has loaded the weights, or after an error."""
        if self.shape_check is not None:
            self.shape_check.remove()


def _check_shapes(module: Any, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise a one-line error for the first weight whose shape in the checkpoint differs from the shape in the model.

    Without this check, the error of torch would list every such weight.
    """
    for name, parameter in module.named_parameters():
        saved = getattr(state.get(prefix + name), "shape", parameter.shape)
        if saved != parameter.shape:
            raise EditError(
                f"the checkpoint was written with the parameter {name!r} of shape {tuple(saved)}, but in the model it "
                f"has shape {tuple(parameter.shape)}; resume with the same model and the same adapters."
            )


def key_figures(metrics: Mapping[str, Any]) -> list[str]:
    """Format the loss, the reliability and the locality for a line about the progress of a run.

    A value that is missing in ``metrics`` is left out. All other metrics are ignored.

    Example:
        >>> key_figures({"loss": 0.05, "edit/reliability": 1.0, "edit/locality/kl": 0.1})
        ['loss 0.050', 'reliability 1.000']
    """
    names = {"loss": "loss", "edit/reliability": "reliability", "edit/locality": "locality"}
    return [f"{name} {float(metrics[key]):.3f}" for key, name in names.items() if key in metrics]


# The key under which a Lightning checkpoint stores the state of the edit.
CHECKPOINT_KEY = "kedit_train"


class LightningEvents(LightningCallback):
    """Receive the events of ``lightning.pytorch.Trainer``.

    Lightning sends every event to every callback. Only the first callback of a run, called its driver, passes the
    events on to the run.
    """

    run: Any = None
    # The state at the end of training, for checkpoints that are saved after training.
    _final_state: dict[str, Any] | None = None

    def _driven_run(self, trainer: Any) -> EditRun | None:
        """Return the trainer's run if this callback is the driver (the first callback of the run), else None."""
        run = self.run
        return run if run is not None and not run.closed and run.host.owner is trainer and run.is_driver(self) else None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Lightning calls setup before configure_optimizers and before the strategy wraps the module.
        if stage == "fit":
            self._final_state = None
            self.run = EditRun.join(pl_module, self, LightningHost(trainer, pl_module))
            self.run.host.check_loaded_shapes()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        run = self._driven_run(trainer)
        if run:
            run.host.end_shape_check()
            for callback in run.callbacks:
                run.attach(callback)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Callback.state_dict() is not used, because Lightning saves it for only one callback of each class.
        run = self._driven_run(trainer)
        if run:
            checkpoint[CHECKPOINT_KEY] = run.state()
        elif self._final_state is not None and self.run.closed and self.run.host.owner is trainer:
            # This is a call of trainer.save_checkpoint() after fit().
            checkpoint[CHECKPOINT_KEY] = with_current_weights(self.run, self._final_state)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Lightning calls this after setup and before on_fit_start. The run restores the state in on_fit_start.
        if self.run is not None:
            self.run.host.checkpoint_state = checkpoint.get(CHECKPOINT_KEY, {})

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # This event belongs to the first micro-batch of a step, so a new step begins, even if a gradient scaler has
        # skipped the previous step.
        run = self._driven_run(trainer)
        if run:
            run.steps.begin()
            run.host.has_loss = False

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        # The penalty is added to the loss in place. A separate backward pass would bypass DDP's gradient reduction, and
        # the processes would then train different weights. Lightning has divided the loss by accumulate_grad_batches.
        # The penalty is not divided, because it is added only once per optimizer step.
        run = self._driven_run(trainer)
        penalty = run.steps.penalty() if run else None
        if run:
            run.host.has_loss = True
        if run and penalty is not None:
            grad_fn: Any = loss.grad_fn
            if getattr(grad_fn, "_saved_result", None) is not None:
                raise EditError(
                    "the penalties of this edit are added to the loss in place, but PyTorch does not allow this for a "
                    f"loss that comes directly from {grad_fn.name()}; call manual_backward(loss * 1.0)."
                )
            loss.add_(penalty.to(loss.device) * run.host.loss_scale())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        run = self._driven_run(trainer)
        # With automatic optimization, training_step may return None to leave out a batch. Without gradients, the
        # optimizer then changes no weight.
        if run and (run.host.has_loss or not pl_module.automatic_optimization):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            run.steps.before_optimizer_step(getattr(optimizer, "optimizer", optimizer), scaler)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        run = self._driven_run(trainer)
        if run is None:
            return
        host: Any = run.host
        if run.step > host.last_step:
            host.last_step = run.step
            run.after_step()
            if trainer.log_every_n_steps and run.step % trainer.log_every_n_steps == 0:
                metrics = run.collect()
                if metrics:
                    host.log(metrics)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        run = self._driven_run(trainer)
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        # max_epochs is -1 if only the number of steps is limited.
        if run and epochs > 0 and (done in (1, epochs) or done % max(1, epochs // 10) == 0):
            run.host.show_progress(", ".join([f"epoch {done} of {epochs}", *key_figures(trainer.callback_metrics)]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        run = self._driven_run(trainer)
        if run:
            self._final_state = run.state()
        if self.run is not None:
            self.run.finish(self)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # A run that was resumed from its last checkpoint takes no step, and Lightning calls no on_train_end for it.
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # This is the last event of a fit. Other code may have written to the weights in on_train_end or on_fit_end.
        if stage == "fit" and self.run is not None and self.run.host.owner is trainer:
            check_after_end(self.run)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.run is not None:
            self.run.close()
            if isinstance(self.run.host, LightningHost):
                self.run.host.end_shape_check()
