"""EditMetrics: evaluate the edits before, during and after training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from kedit_train.arguments import Rule, above, check_arguments, integer_from, optional, within
from kedit_train.atomic_write import check_writable
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.answer_end import describe_end
from kedit_train.core.processes import is_distributed, world_size
from kedit_train.core.run import EditRun
from kedit_train.core.training_format import resolve_format
from kedit_train.data import Edit, EditDataset
from kedit_train.data.tokenization import context_length
from kedit_train.errors import EditError
from kedit_train.evaluation import Report, evaluate
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.reporting import wandb_tables
from kedit_train.evaluation.scoring.router_divergence import RouterDivergence
from kedit_train.paths import PATH

# The scores that every evaluation during training publishes.
_SCORES = ("reliability", "reliability_smallest_token_probability", "generality", "portability", "locality")


class EditMetrics(EditCallback):
    """Evaluate the edits before, during and after training, and log the scores.

    The model answers every prompt by greedy generation. All edits are evaluated on the unedited model before training
    and on the edited model after training. During training, a fixed random sample of the edits is evaluated every
    ``every_n_steps`` optimizer steps.

    The progress bar and the loggers receive the scores ``edit/reliability``, ``edit/generality``, ``edit/portability``
    and ``edit/locality``. Each score is also computed under teacher forcing (the model reads the expected answer) and
    logged. The scores of the best step so far are logged as ``edit/best/*``. The best step is the step with the highest
    reliability. If several steps have the same reliability, the step with the highest locality is the best. If the
    locality is also the same, the earliest step is the best. ``edit/metrics/seconds`` is the total time of all
    evaluations. ``edit/metrics/share_of_time`` is the time of the evaluations during training, divided by the training
    time.

    For a mixture-of-experts model, ``edit/router/kl`` measures how much the edit changes the choice of experts on the
    locality prompts. It is KL(unedited || edited) of the routers' distributions over experts. Details:
    :class:`~kedit_train.evaluation.scoring.router_divergence.RouterDivergence`.

    After training, three tables are logged: all answers (``edit/answers``), changed answers to the locality prompts
    (``edit/changed_elsewhere``), and scores of the target tokens by position (``edit/positions``). W&B also receives
    the report (as a page and as artifacts), the arguments of all callbacks, the hash of the edits, and charts of
    ``edit/positions``.

    The model is prompted in the format of the training examples: as plain text, through the chat template, or as a
    question. The format is read from the dataset of a ``transformers`` or TRL trainer, or from ``EditDataModule``. In
    other loops, set ``EvaluationOptions(prompt_format=)`` if you train on chats or questions.

    In ``transformers``, the results of the trainer's own evaluations also contain the scores. In these results, the
    names start with ``eval_edit_``, for example ``eval_edit_reliability``. You can therefore set
    ``metric_for_best_model="edit_reliability"``. With ``load_best_model_at_end``, the final report describes the model
    that the trainer loads at the end.

    Args:
        edits: an ``EditDataset``, a sequence of ``Edit``, or a path or name that ``EditDataset.load`` reads. None takes
            the edits of the training loop: ``.edits`` of Lightning's data module, or the argument ``edits`` of
            ``editing``.
        every_n_steps: number of optimizer steps between two evaluations. 0 evaluates before and after training only.
        stop_at: end training when an evaluation measures at least this reliability, in (0, 1]. With None, the
            evaluations never end training.
        limit: maximum number of edits per evaluation during training. The edits are a fixed random sample. None takes
            all edits.
        report_path: file for the final report. The ending of the path sets the format: ``.md`` for Markdown, ``.html``
            for HTML, any other ending for JSON. If the file is JSON, the same report is also written as an HTML page in
            the same folder. None writes no file.
        show: whether to print the final report as a table.
        max_fraction_of_time: maximum fraction of the training time that evaluations during training may take, in
            (0, 1). If the evaluations so far took a larger fraction, the next evaluation during training is skipped.
            The evaluations before and after training, and the trainer's own evaluations, are never skipped. With None,
            every evaluation runs. With a fraction, the speed of the machine decides which evaluations are skipped, so
            two runs can differ.
        evaluation: what to measure and how to prompt the model, as
            :class:`~kedit_train.evaluation.options.EvaluationOptions` or a mapping of its fields. None uses the
            defaults.

    Attributes:
        report: the final :class:`~kedit_train.evaluation.Report`. None before the end of training.
        unedited: the report of the model before the edit.
        best: the metrics ``edit/best/*``.
        skipped: number of evaluations that were skipped because of ``max_fraction_of_time``.

    Raises:
        EditError: an argument is out of range, there are no edits, or the report cannot be written.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import EditMetrics, ParameterScope
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> metrics = EditMetrics(edits, every_n_steps=0, show=False)
        >>> with editing(model, [ParameterScope(layers=0.5), metrics], tokenizer=tokenizer) as edit:
        ...     optimizer = torch.optim.AdamW(edit.parameters(), lr=3e-3)
        ...     for _ in range(12):
        ...         optimizer.zero_grad()
        ...         edit.before_step()
        ...         for item in edits:
        ...             ids = torch.tensor([tokenizer(f"{item.prompt} {item.target}")["input_ids"]])
        ...             model(input_ids=ids, labels=ids).loss.backward()
        ...         optimizer.step()
        >>> metrics.unedited.flat()["edit/reliability"], metrics.report.flat()["edit/reliability"]
        (0.0, 1.0)
    """

    order = 60
    follows_steps = True
    duplicate_hint: str | None = "keep one EditMetrics and pass all edits to it"

    def __init__(
        self,
        edits: Any = None,
        *,
        every_n_steps: int = 20,
        stop_at: float | None = None,
        limit: int | None = 100,
        report_path: str | None = None,
        show: bool = True,
        max_fraction_of_time: float | None = None,
        evaluation: EvaluationOptions | None = None,
    ) -> None:
        check_arguments(
            self,
            every_n_steps=(every_n_steps, integer_from(0)),
            stop_at=(stop_at, optional(within("(0, 1]"))),
            limit=(limit, optional(integer_from(1))),
            report_path=(report_path, optional(PATH)),
            max_fraction_of_time=(max_fraction_of_time, optional(within("(0, 1)"))),
        )
        if stop_at is not None:
            check_arguments(self, every_n_steps=(every_n_steps, Rule("> 0 if stop_at is set", above(0).holds)))
        self.edits = edits
        self.every_n_steps = every_n_steps
        self.stop_at = stop_at
        self.limit = limit
        self.report_path = report_path
        self.show = show
        self.max_fraction_of_time = max_fraction_of_time
        # Configuration files that are not read by LightningCLI give a mapping.
        fields = evaluation if isinstance(evaluation, Mapping) else {}
        options = evaluation if isinstance(evaluation, EvaluationOptions) else EvaluationOptions(**fields)
        self.evaluation: EvaluationOptions = options
        self.unedited: Report | None = None
        self.report: Report | None = None
        self.best: dict[str, float] = {}

    def provides(self) -> set[str]:
        if not self.every_n_steps:
            return set()
        names = {f"edit/{name}" for name in _SCORES}
        return names | {"edit/locality_kl"} if "kl" in self.evaluation.extra_metrics else names

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        edits = run.host.edits() if self.edits is None else self.edits
        if edits is None:
            raise EditError(
                f"edits must be given, because this run ({run.host.name}) has no edits of its own; pass edits= (a "
                "path, a list of Edit or an EditDataset)."
            )
        self._edits: Sequence[Edit] = EditDataset.load(edits) if isinstance(edits, str | Path) else edits
        if len(self._edits) == 0:
            raise EditError("edits must not be empty; pass at least one edit.")
        run.edits, self.best = self._edits, {}
        if self.report_path is not None and run.host.is_main:
            check_writable(self.report_path)

    def attach(self, run: EditRun) -> None:
        self.report, self._evaluated_step, self._scores = None, -1, {}
        self.skipped: int = 0
        self._seconds, self._seconds_in_training = 0.0, 0.0
        self._tokenizer, self._options = run.tokenizer(self.evaluation.tokenizer), self.evaluation
        if self.evaluation.prompt_format is None:
            asked = resolve_format(run, self._tokenizer, self._edits)
            self._options = replace(self.evaluation, prompt_format=asked)
        self._answer_end = describe_end(run, self._tokenizer, self._edits, self._options.asked_format)
        # This raises an error if an edit is too long. A trainer that tokenizes the edits itself would truncate or drop
        # such an edit.
        edits = self._edits if isinstance(self._edits, EditDataset) else EditDataset(self._edits)
        max_length = context_length(run.model.config)
        edits.encode(self._tokenizer, max_length=max_length, prompt_format=self._options.asked_format)
        run.host.show_progress(f"evaluating {len(edits)} edits before training")
        with run.reference_model():
            self.unedited = self._gather_distributions(self._evaluate(run, limit=None, before=None))
            settings: dict[str, Any] = {"batch_size": self._options.batch_size}
            settings["prompt_format"] = self._options.asked_format
            with run.host.forward_context():
                self._routers = RouterDivergence(run.model, self._tokenizer, self._edits, **settings)
        self._positions = list(wandb_tables.position_rows("unedited", self.unedited))
        self._training_began = time.perf_counter()
        wandb_tables.log_configuration(run, self.unedited.meta)

    def state(self) -> dict[str, Any]:
        return {"best": self.best} if self.best else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self.best = dict(state.get("best", {}))

    def after_step(self, run: EditRun) -> None:
        if not self.every_n_steps or run.step % self.every_n_steps:
            return
        if self._too_slow():
            self.skipped += 1
            return
        self._evaluate_sample(run)

    def evaluation_metrics(self, run: EditRun) -> dict[str, float]:
        if self._evaluated_step != run.step:
            self._evaluate_sample(run)
        return self._scores

    def finish(self, run: EditRun) -> None:
        meta = {"scope": run.describe_scope(), "steps": run.step}
        meta |= {"callbacks": [repr(callback) for callback in run.callbacks]}
        run.host.show_progress(f"evaluating {len(self._edits)} edits after training")
        report = self._evaluate(run, limit=None, before=self.unedited, reference=run.reference or None)
        scores = report.flat()
        run.publish(scores)
        if not self.best:
            self._update_best(run, scores)
        meta |= {} if self._answer_end is None else {"append_eos": self._answer_end}
        meta |= {"best": self.best, "evaluations_skipped": self.skipped}
        meta |= {"seconds_of_metrics": round(self._seconds, 3)}
        self.report = report = replace(report, meta={**report.meta, **meta})
        run.host.log({**scores, **self.best, **self._time_metrics()}, last=True)
        self._log_tables(run, report)
        if not run.host.is_main:
            return
        if self.show:
            report.print()
        if self.report_path is not None:
            path = report.save(self.report_path)
            is_page = path.suffix in (".md", ".html")
            print(f"report: {path}" + ("" if is_page else f" (as a page: {report.save(path.with_suffix('.html'))})"))

    def _evaluate_sample(self, run: EditRun) -> None:
        """Evaluate the fixed sample of the edits, and log the scores. End training if ``stop_at`` is reached."""
        seconds_before = self._seconds
        report = self._evaluate(run, limit=self.limit, before=self.unedited)
        self._seconds_in_training += self._seconds - seconds_before
        self._scores, self._evaluated_step = report.flat(), run.step
        self._positions += wandb_tables.position_rows(f"step {run.step}", report)
        self._update_best(run, self._scores)
        run.publish(self._scores)
        run.host.log({**self._scores, **self.best, **self._time_metrics()})
        if self.stop_at is not None and self._scores["edit/reliability"] >= self.stop_at:
            run.stop()

    def _evaluate(
        self,
        run: EditRun,
        *,
        limit: int | None,
        before: Report | None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> Report:
        began = time.perf_counter()
        with run.host.forward_context():
            report = evaluate(
                run.model,
                self._tokenizer,
                self._edits,
                options=replace(self._options, distributed=self._is_shared()),
                unedited=before,
                reference_weights=reference,
                limit=limit,
                progress=run.host.is_main and len(self._edits) > self.evaluation.batch_size,
            )
            if before is not None and self._routers.layers:
                report = replace(report, metrics={**report.metrics, "router": {"kl": self._routers.measure(run.model)}})
        self._seconds += time.perf_counter() - began
        return report

    def _is_shared(self) -> bool:
        """Return whether several processes divide the edits of an evaluation among themselves."""
        return self.evaluation.distributed and is_distributed()

    def _gather_distributions(self, report: Report) -> Report:
        """Return the report with the next-token distributions from all processes.

        Each process has the distributions of the unedited model only for its own part of the edits. Later evaluations
        divide the edits among the processes in another way, so every process needs all distributions.
        """
        if not report.distributions or not self._is_shared():
            return report
        parts: list[Any] = [None] * world_size()
        dist.all_gather_object(parts, dict(report.distributions))
        merged = {prompt: distribution for part in parts for prompt, distribution in part.items()}
        return replace(report, distributions=merged)

    def _update_best(self, run: EditRun, scores: Mapping[str, float]) -> None:
        names = ("reliability", "locality")
        current = {f"edit/best/{name}": scores[f"edit/{name}"] for name in names if f"edit/{name}" in scores}
        # The lists are compared by the reliability first, then by the locality. In a tie, the earlier step stays best.
        if not self.best or list(current.values()) > [self.best[name] for name in current]:
            self.best = {"edit/best/step": float(run.step), **current}

    def _share_of_time(self) -> float:
        return self._seconds_in_training / max(time.perf_counter() - self._training_began, 1e-9)

    def _too_slow(self) -> bool:
        if self.max_fraction_of_time is None:
            return False
        decision = [self._share_of_time() > self.max_fraction_of_time]
        if is_distributed():
            # The first process decides for all processes, because an evaluation in which only some of them take part
            # would never end.
            dist.broadcast_object_list(decision, src=0)
        return decision[0]

    def _time_metrics(self) -> dict[str, float]:
        metrics = {"edit/metrics/seconds": self._seconds, "edit/metrics/share_of_time": self._share_of_time()}
        if self.max_fraction_of_time is not None:
            metrics["edit/metrics/skipped"] = float(self.skipped)
        return metrics

    def _log_tables(self, run: EditRun, report: Report) -> None:
        self._positions += wandb_tables.position_rows("edited", report)
        tables = {
            "answers": wandb_tables.answers_table(report),
            "changed_elsewhere": wandb_tables.changed_answers_table(report),
        }
        tables["positions"] = (list(wandb_tables.POSITION_COLUMNS), self._positions)
        for name, (columns, rows) in tables.items():
            if rows:
                run.host.log_table(f"edit/{name}", columns, rows)
        wandb_run = run.host.wandb_run()
        if wandb_run is not None:
            wandb_tables.log_position_curves(wandb_run, self._positions)
            wandb_tables.log_report(run.host, report)

    def __repr__(self) -> str:
        return f"EditMetrics(every_n_steps={self.every_n_steps}, stop_at={self.stop_at})"
