"""Translate the events of ``transformers.Trainer`` and of TRL's trainers to the lifecycle of an edit."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from kedit_train.callbacks.hosts.guarded_loop import calling_trainer, guard_loop
from kedit_train.callbacks.hosts.stacked_experts import check_best_model
from kedit_train.callbacks.hosts.trainer_loggers import TrainerLoggers
from kedit_train.callbacks.hosts.transformers_host import TransformersHost
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


class TransformersEvents(TrainerCallback):
    """Receive the events of ``transformers.Trainer``.

    The trainer sends every event to every callback. Only the first callback of a run, called its driver, passes the
    events on to the run.
    """

    run: Any = None
    # The control object of the trainer that was built with this callback.
    _control: Any = None

    def _driven_run(self, control: Any) -> EditRun | None:
        """Return the trainer's run if this callback is the driver (the first callback of the run), else None."""
        run = self.run
        return run if run is not None and not run.closed and run.host.owner is control and run.is_driver(self) else None

    def _join(self, args: Any, state: Any, control: Any, model: Any, processing_class: Any) -> EditRun:
        if model is None:
            raise EditError(
                "the trainer has no model yet, because it was created with model_init=; create the trainer with model= "
                "instead.",
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

    def join_trainer(self, trainer: Any) -> None:
        """Let this callback join a new ``EditRun`` after its previous run was closed before training began."""
        self._join(trainer.args, trainer.state, trainer.control, trainer.model, trainer.processing_class)

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if self._control is control:
            raise EditError(
                "the same instance is twice in the trainer's callbacks; pass it once.", component=type(self).__name__
            )
        self._control = control
        guard_loop(control)
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
        # Callbacks that were added with add_callback() join the run here. In a second train(), all callbacks join here.
        guard_loop(control)
        run = self._join(args, state, control, model, processing_class)
        run.host.active_callbacks.add(id(self))
        run.host.state, run.host.train_dataloader = state, train_dataloader
        if run.is_driver(self):
            run.host.loggers = TrainerLoggers(calling_trainer(control))
            run.host.warn_about_loggers()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # All callbacks have been prepared by now, including those that were added with add_callback().
        self._attach_all(control)

    def _attach_all(self, control: Any) -> None:
        run = self._driven_run(control)
        if run and not run.has_started:
            self._check_none_removed(run)
            check_best_model(run)
            run.host.mark_checkpoints()
            for callback in run.callbacks:
                run.attach(callback)

    def _check_none_removed(self, run: EditRun) -> None:
        removed = [callback for callback in run.callbacks if id(callback) not in run.host.active_callbacks]
        if removed:
            run.close()
            raise EditError(
                "this callback was removed from the trainer after the trainer was created, so the edit has ended; "
                "create the trainer again without this callback.",
                component=type(removed[0]).__name__,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # The backward pass of the penalty runs before the first micro-batch, on the unwrapped model. So the penalty is
        # counted once with gradient accumulation. The gradients of the penalty are reduced by DDP, and are clipped
        # together with the gradients of the loss.
        if self.run is not None:
            self.run.host.active_callbacks.add(id(self))
        run = self._driven_run(control)
        scaler = getattr(optimizer, "scaler", None)
        if run:
            run.steps.begin(scaler)
        penalty = run.steps.penalty() if run else None
        if penalty is not None:
            (penalty if scaler is None else scaler.scale(penalty)).backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._driven_run(control)
        if run:
            self._check_none_removed(run)
            run.host.active_callbacks.clear()
            run.host.state = state
            run.after_step()
            if not control.should_log:
                self._store_before_save(control, args)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._store_before_save(control, args)

    def _store_before_save(self, control: Any, args: Any) -> None:
        """Write the state of the edit if the trainer is about to write a checkpoint."""
        run = self._driven_run(control)
        if (
            run
            and run.has_started
            and (control.should_save or (control.should_evaluate and args.save_strategy == "best"))
        ):
            run.host.store_state(run)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._driven_run(control)
        if run:
            run.host.store_checkpoint_state(run)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        run = self._driven_run(control)
        if run and run.has_started and metrics is not None:
            host, logging = run.host, control.should_log
            for callback in run.callbacks:
                for key, value in callback.evaluation_metrics(run).items():
                    metrics["eval_" + key.replace("/", "_")] = value
            # The metrics that were measured here belong to this step, so they are added to the last row of the log. A
            # new row would belong to the next step.
            pending, control.should_log = host.take_pending_metrics(), logging
            if pending:
                host.add_to_log_row({}, pending)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        run = self._driven_run(control)
        if run and logs is not None and "loss" in logs:
            host: Any = run.host
            host.add_to_log_row(logs, {**run.collect(), **host.take_pending_metrics()})
            # The state is written after this row is logged, because the state contains the metrics of the row.
            self._store_before_save(control, args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # If a run was resumed from its last checkpoint, no epoch is left, and on_epoch_begin was never called.
        self._attach_all(control)
        if self.run is not None:
            self.run.finish(self)
            if self.run.closed and self.run.host.owner is control:
                self.run.host.collect_states()
