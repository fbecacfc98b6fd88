"""TransformersHost: connect the run of an edit to a ``transformers.Trainer`` or a trainer of TRL."""

from __future__ import annotations

import math
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kedit_train.callbacks.hosts.stacked_experts import load_stacked_experts
from kedit_train.callbacks.hosts.trainer_loggers import TrainerLoggers
from kedit_train.compatibility import checkpoint_without_reentry, sft_reads_logits
from kedit_train.core.host import Host
from kedit_train.core.resume import FORMAT, check_scope
from kedit_train.core.state_file import FILE, load_state, save_state
from kedit_train.errors import EditError, warn
from kedit_train.optional import require
from kedit_train.owners import remove_abandoned

# The key in trainer_state.json under which the id of the edit is saved.
STATE_KEY = "kedit_train"


class TransformersHost(Host):
    """The host for a ``transformers.Trainer`` or a trainer of TRL.

    Each host has an owner: an object that identifies the training loop. For a trainer, this is its ``control`` object,
    because the trainer keeps this object and passes it to every callback.

    Attributes:
        train_dataloader: the data loader for training. It is set when training begins.
        pending_metrics: metrics to add to the next row that the trainer logs.
        edit_id: id that is saved in the checkpoints of this edit, so that a resumed run recognizes them.
        resumed_from: a dict with the id ("edit") and the output folder ("folder") of the edit that the trainer has
            resumed. The dict is empty if the trainer has not resumed an edit.
        loggers: the trainer's loggers except W&B. They are known when training begins.
        active_callbacks: the ids of the callbacks that received the events of this step.
    """

    name = "transformers"

    def __init__(self, args: Any, state: Any, control: Any, processing_class: Any) -> None:
        super().__init__(control)
        self.args, self.state, self.control, self.processing_class = args, state, control, processing_class
        checkpoint_without_reentry(args)
        self.train_dataloader: Any = None
        self.loggers = TrainerLoggers()
        self.pending_metrics: dict[str, float] = {}
        self.edit_id, self.resumed_from = uuid.uuid4().hex, dict[str, str]()
        self.active_callbacks: set[int] = set()
        self._metrics_defined = False
        self._largest_norm: float | None = None
        # Checkpoint states that have been read and not yet been restored, by file.
        self._states: dict[Path, dict[str, Any] | None] = {}

    def mark_checkpoints(self) -> None:
        """Set ``resumed_from``, and save ``edit_id`` in every later ``trainer_state.json``."""
        self.resumed_from = self.state.stateful_callbacks.get(STATE_KEY, {})
        folder = str(Path(self.args.output_dir).resolve())
        self.state.stateful_callbacks[STATE_KEY] = {"edit": self.edit_id, "folder": folder}

    @property
    def resumed(self) -> bool:
        return self.state.global_step > 0

    def saved_state(self) -> dict[str, Any] | None:
        # Callbacks do not receive the path in train(resume_from_checkpoint=...), so several folders are searched. The
        # trainer's state was loaded from this path, and contains the id and the output folder of the edit. A file with
        # another id is ignored.
        path, name = self.args.resume_from_checkpoint, self.checkpoint_folder().name
        folders = [Path(path)] if isinstance(path, str) else []
        folders += [self.checkpoint_folder(), Path(self.resumed_from.get("folder", "")) / name]
        # If a process was killed while it saved, the state may still be next to the checkpoint folder.
        places = [(folder, FILE) for folder in folders] + [(folder.parent, self._early_file()) for folder in folders]
        try:
            for folder, file in places:
                state = self._load(folder, file)
                if state is not None and state.get("edit") == self.resumed_from.get("edit"):
                    return {name: value for name, value in state.items() if name != "edit"}
            return None
        finally:
            self._states.clear()

    def check_saved_scope(self, run: Any, folder: str | os.PathLike[str]) -> None:
        """Check the state of the edit in a checkpoint before the trainer loads the weights of the checkpoint.

        Raises:
            EditError: the checkpoint was written with another scope, or with other adapters.
        """
        state = self._load(Path(folder))
        if state is not None and state.get("format") == FORMAT:
            check_scope(run, state)

    def check_checkpoint(self, run: Any, folder: str) -> None:
        """Load stacked experts from a checkpoint, and check that the checkpoint is complete.

        Call this method before the trainer loads the optimizer state. The trainer itself does not load the stacked
        experts of a mixture-of-experts model (see :func:`load_stacked_experts`).

        A missing optimizer or scheduler state raises an error, or causes a warning if the current run has
        ``save_only_model=True``. A missing state of the random number generators causes a warning.

        Raises:
            EditError: the optimizer or scheduler state is missing, and ``save_only_model`` is False.
        """
        load_stacked_experts(run, folder)
        missing = [part for part in ("optimizer", "scheduler") if not any(Path(folder).glob(f"{part}*"))]
        # The trainer would silently begin with a new optimizer.
        if missing and not self.args.save_only_model:
            raise EditError(
                f"{folder} is incomplete: {missing[0]}.* is missing, because saving was interrupted or save_only_model "
                "was True; resume from another checkpoint, or set save_only_model=True in the training arguments to "
                "continue with a new optimizer."
            )
        lost = [f"{part} state ({part}.*)" for part in missing]
        random_state = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if not (Path(folder) / random_state).exists():
            lost.append(f"random state ({random_state})")
        if lost and self.is_main:
            warn(
                f"{folder} has no {' and no '.join(lost)}, so the final weights of the resumed run may differ from "
                "those of an uninterrupted run; to get the same weights, resume from a complete checkpoint "
                "(written with save_only_model=False)."
            )

    def _load(self, folder: Path, file: str = FILE) -> dict[str, Any] | None:
        """Read the state of the edit from a checkpoint. Each file is read only once."""
        path = (folder / file).resolve()
        if path not in self._states:
            self._states[path] = load_state(folder, file=file)
        return self._states[path]

    def store_state(self, run: Any) -> None:
        """Write the state of the edit next to the checkpoint that the trainer is about to write.

        This is not done in the event ``on_save``, because the trainer sends it only after it has written the checkpoint
        and deleted older checkpoints. If the process were killed before the event, the state would be lost.
        """
        # Every process must do this, because sharded weights are gathered from all processes.
        state = {**run.state(), "edit": self.edit_id}
        if self.is_main:
            save_state(self.args.output_dir, state, file=self._early_file())

    def store_checkpoint_state(self, run: Any) -> None:
        """Write the state of the edit into the checkpoint that the trainer has written."""
        state, folder = {**run.state(), "edit": self.edit_id}, self.checkpoint_folder()
        # A hyperparameter search writes its checkpoints to another folder. Resuming from these checkpoints is refused.
        if self.is_main and folder.is_dir():
            save_state(folder, state)
        self.collect_states()

    def collect_states(self) -> None:
        """Move each state file into its checkpoint, and delete leftover files of processes that were killed."""
        if not self.is_main:
            return
        output = Path(self.args.output_dir)
        for early in output.glob(f"checkpoint-*-{FILE}"):
            folder = output / early.name.removesuffix(f"-{FILE}")
            if folder.is_dir() and not (folder / FILE).exists():
                os.replace(early, folder / FILE)
            else:
                early.unlink(missing_ok=True)
        hidden = f"{FILE}.*.unfinished"
        remove_abandoned([*output.glob(f".checkpoint-*-{hidden}"), *output.glob(f"checkpoint-*/.{hidden}")])

    def disable_clipping(self) -> tuple[str, float] | None:
        value = self.args.max_grad_norm
        if not value or value <= 0:
            return None
        # The trainer reads this argument in every step.
        self._largest_norm, self.args.max_grad_norm = value, 0.0
        return "max_grad_norm", value

    def restore_clipping(self) -> None:
        if self._largest_norm is not None:
            self.args.max_grad_norm, self._largest_norm = self._largest_norm, None

    def _early_file(self) -> str:
        return f"{self.checkpoint_folder().name}-{FILE}"

    def edits(self) -> Any | None:
        # EditSFTTrainer stores its edits in its arguments.
        return getattr(self.args, "trained_edits", None)

    def checkpoint_folder(self) -> Path:
        """Return the folder of the checkpoint of the current step."""
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    @property
    def is_main(self) -> bool:
        return self.state.is_world_process_zero

    @property
    def loads_best_weights(self) -> bool:
        return bool(self.args.load_best_model_at_end)

    @property
    def steps(self) -> int | None:
        return self.state.max_steps or None

    @property
    def epoch_steps(self) -> int | None:
        batches = self._batches()
        return None if batches is None else math.ceil(batches / self.args.gradient_accumulation_steps)

    def _batches(self) -> int | None:
        try:
            return len(self.train_dataloader)
        except TypeError:  # A streaming data set has no length.
            return None

    def tokenizer(self) -> Any | None:
        # A processor of a vision-language model contains a tokenizer.
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def summed_micro_batches(self) -> int:
        # The trainer divides each loss by the token count of the whole step. It then adds up the losses of all
        # micro-batches and processes.
        micro_batches = self.args.gradient_accumulation_steps
        batches = self._batches()
        if batches is not None:
            done = self.state.global_step % math.ceil(batches / micro_batches) * micro_batches
            micro_batches = min(micro_batches, batches - done)
        return micro_batches * (self.args.world_size if self.args.average_tokens_across_devices else 1)

    @property
    def reads_logits(self) -> bool:
        return sft_reads_logits(self.args)

    def unsupported_reason(self) -> str | None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.args.world_size != launched:
            return (
                f"{launched} processes were started but the trainer uses {self.args.world_size}, so each process "
                "trains its own model (on CPUs, set use_cpu=True in the training arguments)"
            )
        # accelerate launch --use_deepspeed sets only the plugin.
        uses_deepspeed = self.args.deepspeed or getattr(self.args, "deepspeed_plugin", None)
        return "DeepSpeed updates flattened copies of the weights" if uses_deepspeed else None

    def loss_unsupported_reason(self) -> str | None:
        if self.args.n_gpu > 1:
            return "torch.nn.DataParallel copies the model without its hooks; start one process per GPU"
        # GRPO, RLOO, SDFT, DistillationTrainer, GKD and others. RLOO calls the model with labels, but the result is a
        # probability in its loss and not the loss itself.
        if any(hasattr(self.args, name) for name in ("max_completion_length", "max_new_tokens")):
            return (
                f"this trainer (configured by {type(self.args).__name__}) computes its own loss from completions; use "
                "SFTTrainer, or remove this callback"
            )
        if getattr(self.args, "label_smoothing_factor", 0):
            return (
                "with label_smoothing_factor, the trainer computes the loss outside of the model; set "
                "label_smoothing_factor=0"
            )
        if getattr(self.args, "loss_type", None) not in (None, "nll"):
            return (
                f"with loss_type={self.args.loss_type!r}, the trainer does not use the loss that the model returns; "
                'use SFTTrainer with loss_type="nll", or remove this callback'
            )
        return None

    def show_progress(self, line: str) -> None:
        # The trainer's bar stands still while texts are read before the first step.
        if self.is_main and not self.args.disable_tqdm:
            tqdm.write(line, file=sys.stderr)

    def log(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        self.pending_metrics.update(metrics)
        if last:
            row = {**self.pending_metrics, "epoch": self.state.epoch, "step": self.state.global_step}
            self.state.log_history.append(row)
            self._to_loggers(self.take_pending_metrics(), last=True)
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
        self._to_loggers(metrics)

    def warn_about_loggers(self) -> None:
        """Warn about each logger in ``report_to`` for which the trainer has no callback.

        Such a logger receives no ``edit/*`` metrics. All other loggers receive these metrics:

        - W&B receives all rows, tables, charts and files, in the run that the trainer opened.
        - The console, the progress bar and ``trainer.state.log_history`` receive all rows of numbers.
        - Other loggers, such as TensorBoard, trackio, MLflow and Comet, receive the rows of numbers during training
          (:class:`TrainerLoggers`).

        No logger receives the scores ``eval_edit_*``, because the trainer logs an evaluation before these scores are
        added. ``metric_for_best_model`` and later callbacks, such as ``EarlyStoppingCallback``, can use these scores.
        """
        others = self.loggers.unreachable(self.args.report_to)
        if others and self.is_main:
            warn(
                f"edit/* metrics do not reach {', '.join(others)}, because the trainer has no callback for these "
                "loggers; read the metrics in wandb, on the console or in trainer.state.log_history."
            )

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        run = self.wandb_run()
        if run is not None:
            with require("wandb", extra="wandb"):
                import wandb

            # wandb requires lists, and rejects columns of mixed types by default.
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
            run.log({key: table, "train/global_step": self.state.global_step})

    def stop(self) -> None:
        self.control.should_training_stop = True

    def _to_loggers(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        if self.is_main:
            self.loggers.add_to_notebook_table(self.args, self.state, metrics)
            self.loggers.send(self.args, self.state, self.control, metrics, last=last)
        run = self.wandb_run()
        if run is not None and metrics:
            # The argument step= is not passed, because wandb silently drops a row if its step is below wandb's own
            # counter. The trainer's WandbCallback uses the key train/global_step for the x-axis.
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
