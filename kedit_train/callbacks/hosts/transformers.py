"""``transformers.Trainer`` and the trainers of TRL: which of their events is which moment of an edit."""

from __future__ import annotations

import math
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kedit_train.core.host import Host
from kedit_train.core.run import EditRun
from kedit_train.core.state_file import load_state, save_state
from kedit_train.errors import EditError
from kedit_train.optional import require


class TransformersHost(Host):
    """A trainer, known by its ``control``: the one object of its own that lives as long as it and reaches callbacks."""

    name = "transformers"

    def __init__(self, args: Any, state: Any, control: Any, processing_class: Any) -> None:
        super().__init__(control)
        self.args, self.state, self.control, self.processing_class = args, state, control, processing_class
        self.train_dataloader: Any = None
        self.pending: dict[str, float] = {}
        self._defined = False
        # Written into trainer_state.json by note(), so that a resumed run knows which file of an edit is its own.
        self.edit, self.origin = uuid.uuid4().hex, dict[str, str]()
        self.present: set[int] = set()

    def note(self) -> None:
        """Find out which edit the trainer has resumed, and mark what it writes from now on as this one's."""
        self.origin = self.state.stateful_callbacks.get(KEY, {})
        folder = str(Path(self.args.output_dir).resolve())
        self.state.stateful_callbacks[KEY] = {"edit": self.edit, "folder": folder}

    @property
    def resumed(self) -> bool:
        return self.state.global_step > 0

    def saved_state(self) -> dict[str, Any] | None:
        # Where train(resume_from_checkpoint=...) pointed to, callbacks are not told. The trainer's state, which comes
        # from there, names the edit and the folder that it was written to; a file of another edit is not taken.
        given, name = self.args.resume_from_checkpoint, self.checkpoint_folder().name
        folders = [Path(given)] if isinstance(given, str) else []
        folders += [self.checkpoint_folder(), Path(self.origin.get("folder", "")) / name]
        for folder in folders:
            state = load_state(folder)
            if state is not None and state.pop("edit", None) == self.origin.get("edit"):
                return state
        return None

    def checkpoint_folder(self) -> Path:
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
        # A processor (vision-language models) carries its tokenizer.
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def loss_shares(self) -> int:
        """The trainer sums micro-batch losses that were divided by the whole step's token count, over ranks as well."""
        window = self.args.gradient_accumulation_steps
        if hasattr(self.train_dataloader, "__len__"):
            batches = len(self.train_dataloader)
            done = self.state.global_step % math.ceil(batches / window) * window
            window = min(window, batches - done)
        return window * (self.args.world_size if self.args.average_tokens_across_devices else 1)

    def refused(self) -> str | None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.args.world_size != launched:
            return (
                f"{launched} processes were started and the trainer knows of {self.args.world_size}, so each would "
                "train for itself (on CPUs, set use_cpu=True in its arguments)"
            )
        return "DeepSpeed steps on flat copies of the weights" if self.args.deepspeed else None

    def objective_refused(self) -> str | None:
        if self.args.n_gpu > 1:
            return "torch.nn.DataParallel replicates the model without its hooks; start one process per GPU"
        if getattr(self.args, "label_smoothing_factor", 0):
            return "label_smoothing_factor takes the loss away from the model; set it to 0"
        if getattr(self.args, "loss_type", None) not in (None, "nll"):
            return (
                f"loss_type={self.args.loss_type!r} is made of log-probabilities, where no token has a target of its "
                "own; take SFTTrainer with loss_type='nll', or leave this callback out"
            )
        return None

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        self.pending.update(metrics)
        if last:
            self.state.log_history.append({**self.pending, "epoch": self.state.epoch, "step": self.state.global_step})
            self._to_wandb(self.flush())
        else:
            # The row that this asks for carries the host's own loss as well; see on_log.
            self.control.should_log = True

    def flush(self) -> dict[str, float]:
        metrics, self.pending = self.pending, {}
        return metrics

    def to_loggers(self, logs: dict[str, Any], metrics: dict[str, float]) -> None:
        """Add to a row that the trainer is logging: its progress bar and its history see the row after us."""
        logs.update(metrics)
        if self.state.log_history:
            self.state.log_history[-1].update(metrics)
        self._to_wandb(metrics)

    def warn_of_loggers(self) -> None:
        """Say which of the trainer's loggers have had a row before any callback can add to it.

        What reaches which: W&B gets every row, table, chart and file, into the run that the trainer opened. The
        console, the progress bar and ``trainer.state.log_history`` get every row of numbers. TensorBoard, trackio,
        MLflow, Comet and the others, each a callback that stands before ours, get none. Scores of the trainer's own
        evaluation (``eval_edit_*``) are added after its row was logged: they are there for
        ``metric_for_best_model`` and for callbacks that stand after ours, ``EarlyStoppingCallback`` say.
        """
        reports = [self.args.report_to] if isinstance(self.args.report_to, str) else self.args.report_to or []
        others = [name for name in reports if name not in ("wandb", "none")]
        if others and self.is_main:
            warnings.warn(
                f"edit/* metrics do not reach {', '.join(others)}, which the trainer calls before its callbacks; they "
                "are in wandb, on the console and in trainer.state.log_history",
                stacklevel=2,
            )

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        run = self.wandb_run()
        if run is not None:
            with require("wandb", extra="wandb"):
                import wandb

            # A plain list of rows: wandb copies it, and mixed columns need to be allowed.
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
            run.log({key: table, "train/global_step": self.state.global_step})

    def stop(self) -> None:
        self.control.should_training_stop = True

    def _to_wandb(self, metrics: Mapping[str, float]) -> None:
        run = self.wandb_run()
        if run is not None and metrics:
            # Never step=: a row behind wandb's internal step is dropped without a word. WandbCallback names this axis.
            run.log({**metrics, "train/global_step": self.state.global_step})

    def wandb_run(self) -> Any | None:
        reports = self.args.report_to or []
        if not self.is_main or "wandb" not in ([reports] if isinstance(reports, str) else reports):
            return None
        with require("wandb", extra="wandb"):
            import wandb

        if wandb.run is not None and not self._defined:
            self._defined = True
            wandb.run.define_metric("edit/*", step_metric="train/global_step", step_sync=True)
        return wandb.run


KEY = "kedit_train"


class TransformersEvents(TrainerCallback):
    """Events of ``transformers.Trainer``, each passed on once: the first callback on the list drives the run."""

    run: Any = None
    _built: Any = None

    def _run_of(self, control: Any) -> EditRun | None:
        run = self.run
        return run if run is not None and not run.closed and run.host.owner is control and run.leads(self) else None

    def _enter(self, args: Any, state: Any, control: Any, model: Any, processing_class: Any) -> EditRun:
        if model is None:
            raise EditError(f"{type(self).__name__}: the trainer has no model yet (model_init=); pass model=")
        run = self.run
        if run is not None and not any(module is run.root for module in model.modules()):
            # model_init made another model for this training.
            run.close()
        if run is None or run.closed or run.host.owner is not control:
            host = TransformersHost(args, state, control, processing_class)
            run = self.run = EditRun.join(model, self, host)
        return run

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if self._built is control:
            raise EditError(f"{self!r} stands twice in the trainer's callbacks, and would act twice: name it once")
        self._built = control
        self._enter(args, state, control, model, processing_class)

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
        # Callbacks that were added after the trainer was built, and a second train(), enter here.
        run = self._enter(args, state, control, model, processing_class)
        run.host.present.add(id(self))
        run.host.state, run.host.train_dataloader = state, train_dataloader
        if run.leads(self):
            run.host.warn_of_loggers()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not before every callback has been prepared, those that came by add_callback() as well.
        run = self._run_of(control)
        if run and not run.attached:
            self._check_present(run)
            run.host.note()
            for callback in run.callbacks:
                run.attach(callback)

    def _check_present(self, run: EditRun) -> None:
        gone = [callback for callback in run.callbacks if id(callback) not in run.host.present]
        if gone:
            run.close()
            raise EditError(
                f"{gone[0]!r} was removed from the trainer after it had been built with it, and the model released: "
                "build the trainer again without it"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # Before the first micro-batch and on the unwrapped model: so it counts once whatever the accumulation, is
        # clipped with the rest, and DDP reduces it together with the gradients that follow.
        if self.run is not None:
            self.run.host.present.add(id(self))
        run = self._run_of(control)
        if run:
            run.steps.begin()
        penalty = run.steps.penalty() if run else None
        if penalty is not None:
            scaler = getattr(optimizer, "scaler", None)
            (penalty if scaler is None else scaler.scale(penalty)).backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._run_of(control)
        if run:
            self._check_present(run)
            run.host.present.clear()
            run.host.state = state
            run.after_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._run_of(control)
        if run:
            # On every process: gathering sharded weights takes them all.
            state_of_edit, folder = {**run.state(), "edit": run.host.edit}, run.host.checkpoint_folder()
            # A hyperparameter search writes elsewhere; there a resume will be refused.
            if run.host.is_main and folder.is_dir():
                save_state(folder, state_of_edit)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        run = self._run_of(control)
        if run and run.attached and metrics is not None:
            host, logging = run.host, control.should_log
            for callback in run.callbacks:
                for key, value in callback.evaluated(run).items():
                    metrics["eval_" + key.replace("/", "_")] = value
            # A look that was taken for this belongs to this step; the loss row that it asks for would be the next's.
            pending, control.should_log = host.flush(), logging
            if pending:
                host.to_loggers({}, pending)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        run = self._run_of(control)
        if run and logs is not None and "loss" in logs:
            host: Any = run.host
            host.to_loggers(logs, {**run.collect(), **host.flush()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.run
        if run is not None:
            run.finish(self)
