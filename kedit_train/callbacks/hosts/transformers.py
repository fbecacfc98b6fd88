"""TransformersHost: translate the events of ``transformers.Trainer`` and TRL to the steps of an edit."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kedit_train.core.host import Host
from kedit_train.core.run import EditRun
from kedit_train.core.state_file import load_state, save_state
from kedit_train.errors import EditError, warn
from kedit_train.optional import require


class TransformersHost(Host):
    """The host for a ``transformers.Trainer`` or a trainer of TRL.

    The owner of the host is the trainer's ``control`` object. The trainer passes this object to every callback and
    keeps it as long as the trainer itself exists. No other object has both properties.

    Attributes:
        train_dataloader: the data loader for training. It is set when training begins.
        pending_metrics: metrics to add to the next row that the trainer logs.
        edit_id: id that is saved in the checkpoints of this edit, so that a resumed run recognizes them.
        resumed_from: a dict with the id ("edit") and the output folder ("folder") of the edit that the trainer has
            resumed. The dict is empty if the trainer has not resumed an edit.
        active_callbacks: the ids of the callbacks that received the events of this step.
    """

    name = "transformers"

    def __init__(self, args: Any, state: Any, control: Any, processing_class: Any) -> None:
        super().__init__(control)
        self.args, self.state, self.control, self.processing_class = args, state, control, processing_class
        self.train_dataloader: Any = None
        self.pending_metrics: dict[str, float] = {}
        self.edit_id, self.resumed_from = uuid.uuid4().hex, dict[str, str]()
        self.active_callbacks: set[int] = set()
        self._metrics_defined = False

    def mark_checkpoints(self) -> None:
        """Read the id of the resumed edit, and save ``edit_id`` in every later ``trainer_state.json``."""
        self.resumed_from = self.state.stateful_callbacks.get(STATE_KEY, {})
        folder = str(Path(self.args.output_dir).resolve())
        self.state.stateful_callbacks[STATE_KEY] = {"edit": self.edit_id, "folder": folder}

    @property
    def resumed(self) -> bool:
        return self.state.global_step > 0

    def saved_state(self) -> dict[str, Any] | None:
        # Callbacks do not learn the path given to train(resume_from_checkpoint=...). The trainer's state, which was
        # loaded from there, names the edit and its output folder. The file of another edit is ignored.
        path, name = self.args.resume_from_checkpoint, self.checkpoint_folder().name
        folders = [Path(path)] if isinstance(path, str) else []
        folders += [self.checkpoint_folder(), Path(self.resumed_from.get("folder", "")) / name]
        for folder in folders:
            state = load_state(folder)
            if state is not None and state.pop("edit", None) == self.resumed_from.get("edit"):
                return state
        return None

    def checkpoint_folder(self) -> Path:
        """Return the folder of the checkpoint of the current step."""
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    @property
    def is_main(self) -> bool:
        return self.state.is_world_process_zero

    @property
    def steps(self) -> int | None:
        return self.state.max_steps or None

    @property
    def epoch_steps(self) -> int | None:
        if not hasattr(self.train_dataloader, "__len__"):
            return None
        return math.ceil(len(self.train_dataloader) / self.args.gradient_accumulation_steps)

    def tokenizer(self) -> Any | None:
        # A processor of a vision-language model contains a tokenizer.
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def summed_micro_batches(self) -> int:
        # The trainer divides each loss by the token count of the whole step, and adds them up, over ranks as well.
        micro_batches = self.args.gradient_accumulation_steps
        if hasattr(self.train_dataloader, "__len__"):
            batches = len(self.train_dataloader)
            done = self.state.global_step % math.ceil(batches / micro_batches) * micro_batches
            micro_batches = min(micro_batches, batches - done)
        return micro_batches * (self.args.world_size if self.args.average_tokens_across_devices else 1)

    def unsupported_reason(self) -> str | None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.args.world_size != launched:
            return (
                f"{launched} processes were started but the trainer uses {self.args.world_size}, so each would train "
                "its own model (on CPUs, set use_cpu=True in the training arguments)"
            )
        return "DeepSpeed updates flattened copies of the weights" if self.args.deepspeed else None

    def loss_unsupported_reason(self) -> str | None:
        if self.args.n_gpu > 1:
            return "torch.nn.DataParallel copies the model without its hooks; start one process per GPU"
        if getattr(self.args, "label_smoothing_factor", 0):
            return "with label_smoothing_factor, the trainer computes the loss outside of the model; set it to 0"
        if getattr(self.args, "loss_type", None) not in (None, "nll"):
            return (
                f"loss_type={self.args.loss_type!r} has no target for each token; use SFTTrainer with "
                'loss_type="nll", or leave this callback out'
            )
        return None

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        self.pending_metrics.update(metrics)
        if last:
            row = {**self.pending_metrics, "epoch": self.state.epoch, "step": self.state.global_step}
            self.state.log_history.append(row)
            self._to_wandb(self.take_pending_metrics())
        else:
            # The trainer then logs a row with its own loss, and on_log adds the pending metrics to the row.
            self.control.should_log = True

    def take_pending_metrics(self) -> dict[str, float]:
        """Return the pending metrics and clear them."""
        metrics, self.pending_metrics = self.pending_metrics, {}
        return metrics

    def add_to_log_row(self, logs: dict[str, Any], metrics: dict[str, float]) -> None:
        """Add metrics to a row that the trainer is logging, before the progress bar and the history read the row."""
        logs.update(metrics)
        if self.state.log_history:
            self.state.log_history[-1].update(metrics)
        self._to_wandb(metrics)

    def warn_about_loggers(self) -> None:
        """Warn about loggers of the trainer that do not receive ``edit/*`` metrics.

        W&B receives every row, table, chart and file, in the run that the trainer opened. The console, the progress bar
        and ``trainer.state.log_history`` receive every row of numbers. Other loggers, such as TensorBoard, trackio,
        MLflow and Comet, receive no ``edit/*`` metrics, because the trainer calls these loggers before the user's
        callbacks. When the trainer evaluates, it logs its own metrics first. Only then are the scores ``eval_edit_*``
        added to these metrics. ``metric_for_best_model`` and later callbacks, such as ``EarlyStoppingCallback``, can
        use the scores.
        """
        reports = [self.args.report_to] if isinstance(self.args.report_to, str) else self.args.report_to or []
        others = [name for name in reports if name not in ("wandb", "none")]
        if others and self.is_main:
            warn(
                f"edit/* metrics do not reach {', '.join(others)}, because the trainer calls these loggers before "
                "the user's callbacks; read the metrics in wandb, on the console or in trainer.state.log_history."
            )

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        run = self.wandb_run()
        if run is not None:
            with require("wandb", extra="wandb"):
                import wandb

            # wandb wants lists, and refuses columns of mixed types by default.
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
            run.log({key: table, "train/global_step": self.state.global_step})

    def stop(self) -> None:
        self.control.should_training_stop = True

    def _to_wandb(self, metrics: Mapping[str, float]) -> None:
        run = self.wandb_run()
        if run is not None and metrics:
            # Do not pass step=: wandb silently drops a row whose step is behind its internal one. The trainer's
            # WandbCallback uses this key for the x-axis.
            run.log({**metrics, "train/global_step": self.state.global_step})

    def wandb_run(self) -> Any | None:
        reports = self.args.report_to or []
        if not self.is_main or "wandb" not in ([reports] if isinstance(reports, str) else reports):
            return None
        with require("wandb", extra="wandb"):
            import wandb

        if wandb.run is not None and not self._metrics_defined:
            self._metrics_defined = True
            wandb.run.define_metric("edit/*", step_metric="train/global_step", step_sync=True)
        return wandb.run


# Where trainer_state.json keeps the id of the edit.
STATE_KEY = "kedit_train"


class TransformersEvents(TrainerCallback):
    """Receives the events of ``transformers.Trainer``.

    The trainer sends every event to every callback. Only the first callback of a run, called its driver, passes the
    events on to the run.
    """

    run: Any = None
    # The control object of the trainer that was built with this callback.
    _control: Any = None

    def _driven_run(self, control: Any) -> EditRun | None:
        """Return the trainer's run if this callback is the driver of the run, else None."""
        run = self.run
        return run if run is not None and not run.closed and run.host.owner is control and run.is_driver(self) else None

    def _join(self, args: Any, state: Any, control: Any, model: Any, processing_class: Any) -> EditRun:
        if model is None:
            raise EditError(
                "the trainer has no model yet, because it was created with model_init=; create it with model= instead.",
                component=type(self).__name__,
            )
        run = self.run
        if run is not None and not any(module is run.root for module in model.modules()):
            # model_init has created another model for this training.
            run.close()
        if run is None or run.closed or run.host.owner is not control:
            host = TransformersHost(args, state, control, processing_class)
            run = self.run = EditRun.join(model, self, host)
        return run

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if self._control is control:
            raise EditError(
                "the same instance is twice in the trainer's callbacks; pass it once.", component=type(self).__name__
            )
        self._control = control
        self._join(args, state, control, model, processing_class)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        # Callbacks that were added after the trainer was created join here, and all of them at a second train().
        run = self._join(args, state, control, model, processing_class)
        run.host.active_callbacks.add(id(self))
        run.host.state, run.host.train_dataloader = state, train_dataloader
        if run.is_driver(self):
            run.host.warn_about_loggers()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Only now has every callback been prepared, including the callbacks that add_callback() added.
        run = self._driven_run(control)
        if run and not run.has_started:
            self._check_none_removed(run)
            run.host.mark_checkpoints()
            for callback in run.callbacks:
                run.attach(callback)

    def _check_none_removed(self, run: EditRun) -> None:
        removed = [callback for callback in run.callbacks if id(callback) not in run.host.active_callbacks]
        if removed:
            run.close()
            raise EditError(
                "this callback was removed from a trainer that was created with it, and this has ended the edit; "
                "create the trainer again without this callback.",
                component=type(removed[0]).__name__,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # The penalty's backward pass runs before the first micro-batch and on the unwrapped model. So it is counted
        # once under gradient accumulation, and its gradients are clipped and reduced by DDP like those of the loss.
        if self.run is not None:
            self.run.host.active_callbacks.add(id(self))
        run = self._driven_run(control)
        if run:
            run.steps.begin()
        penalty = run.steps.penalty() if run else None
        if penalty is not None:
            scaler = getattr(optimizer, "scaler", None)
            (penalty if scaler is None else scaler.scale(penalty)).backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._driven_run(control)
        if run:
            self._check_none_removed(run)
            run.host.active_callbacks.clear()
            run.host.state = state
            run.after_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._driven_run(control)
        if run:
            # Every process must do this, because sharded weights are gathered from all processes.
            edit_state, folder = {**run.state(), "edit": run.host.edit_id}, run.host.checkpoint_folder()
            # A hyperparameter search writes its checkpoints to another folder; resuming from those is refused.
            if run.host.is_main and folder.is_dir():
                save_state(folder, edit_state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        run = self._driven_run(control)
        if run and run.has_started and metrics is not None:
            host, logging = run.host, control.should_log
            for callback in run.callbacks:
                for key, value in callback.evaluation_metrics(run).items():
                    metrics["eval_" + key.replace("/", "_")] = value
            # Metrics measured here belong to this step. The log row that they requested would belong to the next step.
            pending, control.should_log = host.take_pending_metrics(), logging
            if pending:
                host.add_to_log_row({}, pending)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        run = self._driven_run(control)
        if run and logs is not None and "loss" in logs:
            host: Any = run.host
            host.add_to_log_row(logs, {**run.collect(), **host.take_pending_metrics()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.run
        if run is not None:
            run.finish(self)
