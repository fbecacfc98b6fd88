"""Did it take? What the model answers before, during and after the edit, where the host logs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from kedit_train.atomic_write import check_writable
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.processes import is_distributed, world_size
from kedit_train.core.run import EditRun
from kedit_train.data import Edit, EditDataset
from kedit_train.data.prompts import PromptFormat, check_format
from kedit_train.data.tokenization import context_length
from kedit_train.errors import EditError
from kedit_train.evaluation import Report, evaluate
from kedit_train.evaluation.asking.probes import EXTRAS
from kedit_train.evaluation.reporting import wandb_tables as logged


class EditMetrics(EditCallback):
    """Ask the model, greedily and to its own end of text, what it was edited to answer and what it was to leave alone.

    The unedited model is asked first, then a sample of the edits during training, then all of them at the end. The
    scores (``edit/reliability``, ``edit/generality``, ``edit/portability``, ``edit/locality``, each with its
    teacher-forced neighbour) appear in the host's progress bar and loggers, with the best look so far
    (``edit/best/step``, ``edit/best/reliability``, ...: the highest reliability, then locality, then the earlier step),
    and with what this took (``edit/metrics/seconds`` in all, ``edit/metrics/share_of_time`` of the training's time by
    looks). At the end there are tables of answers (``edit/answers``, ``edit/changed_elsewhere``) and of the targets
    token by token (``edit/positions``); in W&B also charts of these, the configuration with the hash of the edits, and
    the report as an artifact.

    In ``transformers``, evaluations of the trainer's own get the scores as ``eval_edit_reliability`` and so on (every
    ``/`` becomes ``_``), so that ``metric_for_best_model="edit_reliability"`` works, with ``load_best_model_at_end``
    too: the final report is then that of the model that was loaded.

    Args:
        edits: an ``EditDataset``, a sequence of ``Edit``, or a path that ``EditDataset.load`` reads; None takes the
            ``.edits`` of Lightning's data module.
        every_n_steps: optimizer steps between two looks; 0 looks at the end only.
        stop_at: end training at this reliability of the sample.
        sample: edits for each look during training, drawn once; None takes all.
        batch_size: prompts generated together.
        max_new_tokens: the longest answer.
        report: where to write the final report as JSON (Markdown where it ends in ``.md``).
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        show: print the table at the end.
        metrics: what to measure beside the core, at every look: any of "prefixes", "format", "kl", "resurgence",
            "fluency"; see :func:`~kedit_train.evaluation.evaluate` for what each costs.
        full: measure all of these.
        texts: unrelated texts for the perplexity, a list or what ``KLLocality`` reads.
        max_fraction_of_time: leave a look out (and count it, ``edit/metrics/skipped``) where looks have taken more than
            this share of the training's time so far; never the first, the final one, or one that the host's evaluation
            asks for. None never does: which looks are left out depends on the machine, and so does what hangs on them.
        distributed: share the edits out where several processes train, instead of asking everything on each. Not for
            models that FSDP2 shards.
        prompt_format: in which form to ask: as it stands ("plain"), through the tokenizer's template as a "chat", or
            framed as a "question"; to be that of the training.
    """

    order = 60

    duplicate_hint = "give one of them all the edits"

    def __init__(
        self,
        edits: Any = None,
        every_n_steps: int = 20,
        stop_at: float | None = None,
        sample: int | None = 100,
        batch_size: int = 64,
        max_new_tokens: int = 32,
        report: str | None = None,
        tokenizer: Any = None,
        show: bool = True,
        metrics: Sequence[str] | None = None,
        full: bool = False,
        texts: Any = None,
        max_fraction_of_time: float | None = None,
        distributed: bool = False,
        prompt_format: PromptFormat = "plain",
    ) -> None:
        check_format(prompt_format)
        if every_n_steps < 0 or (sample is not None and sample < 1):
            raise EditError(f"EditMetrics: every_n_steps={every_n_steps}, sample={sample}: expected >= 0 and >= 1")
        if stop_at is not None and not (0.0 < stop_at <= 1.0 and every_n_steps):
            raise EditError(f"EditMetrics: stop_at={stop_at} needs a reliability in (0, 1] and every_n_steps > 0")
        if isinstance(metrics, str) or not set(metrics or ()) <= set(EXTRAS):
            raise EditError(f"EditMetrics: metrics={metrics!r} is no list of any of {', '.join(EXTRAS)}")
        if max_fraction_of_time is not None and not 0.0 < max_fraction_of_time < 1.0:
            raise EditError(f"EditMetrics: max_fraction_of_time={max_fraction_of_time} is no share in (0, 1)")
        self.edits, self.every_n_steps, self.stop_at, self.sample = edits, every_n_steps, stop_at, sample
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.report_path, self.tokenizer, self.show = report, tokenizer, show
        self.extras = set(EXTRAS) if full else set(metrics or ())
        self.texts, self.max_fraction_of_time, self.distributed = texts, max_fraction_of_time, distributed
        self.prompt_format: PromptFormat = prompt_format
        self.unedited: Report | None = None
        self.report: Report | None = None
        self.best: dict[str, float] = {}

    def provides(self) -> set[str]:
        if not self.every_n_steps:
            return set()
        names = ("reliability", "reliability_smallest_token_probability", "generality", "portability", "locality")
        return {f"edit/{name}" for name in (*names, *(("locality_kl",) if "kl" in self.extras else ()))}

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        edits = run.host.edits() if self.edits is None else self.edits
        if edits is None:
            raise EditError(
                f"EditMetrics: this {run.host.name} run holds no edits of its own (a data module with .edits does); "
                "give edits=, a path or an EditDataset"
            )
        self._edits = load_edits(edits)
        run.edits, self.best = self._edits, {}
        if self.report_path is not None and run.host.is_main:
            check_writable(self.report_path)

    def attach(self, run: EditRun) -> None:
        self.report, self._looked_at, self._scores = None, -1, {}
        self.skipped, self._seconds, self._in_looks = 0, 0.0, 0.0
        self._tokenizer = run.tokenizer(self.tokenizer)
        # Hosts that tokenise by themselves would cut or drop an edit that is too long.
        edits = self._edits if isinstance(self._edits, EditDataset) else EditDataset(self._edits)
        longest = context_length(run.model.config)
        edits.encode(self._tokenizer, max_length=longest, prompt_format=self.prompt_format)
        with run.reference_model():
            self.unedited = self._whole(self._evaluate(run, limit=None, before=None))
        self._positions = list(logged.positions("unedited", self.unedited))
        self._began = time.perf_counter()
        board = run.host.wandb_run()
        if board is not None:
            board.config.update({"edit": self._settings(run)}, allow_val_change=True)

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
        self._look(run)

    def evaluation_metrics(self, run: EditRun) -> dict[str, float]:
        if self._looked_at != run.step:
            self._look(run)
        return self._scores

    def finish(self, run: EditRun) -> None:
        meta = {"scope": run.describe_scope(), "steps": run.step}
        meta |= {"callbacks": [repr(callback) for callback in run.callbacks]}
        report = self._evaluate(run, limit=None, before=self.unedited, reference=run.reference or None)
        scores = report.flat()
        run.publish(scores)
        if not self.best:
            self._note_best(run, scores)
        meta |= {"best": self.best, "looks_skipped": self.skipped, "seconds_of_metrics": round(self._seconds, 3)}
        self.report = report = replace(report, meta={**report.meta, **meta})
        run.host.log({**scores, **self.best, **self._cost()}, last=True)
        self._positions += logged.positions("edited", report)
        tables = {"answers": logged.answers(report), "changed_elsewhere": logged.elsewhere(report)}
        tables["positions"] = (list(logged.POSITIONS), self._positions)
        for name, (columns, rows) in tables.items():
            if rows:
                run.host.log_table(f"edit/{name}", columns, rows)
        board = run.host.wandb_run()
        if board is not None:
            logged.curves_to_wandb(board, self._positions)
            logged.keep_report(run.host, report)
        if not run.host.is_main:
            return
        if self.show:
            report.print()
        if self.report_path is not None:
            print(f"report: {report.save(self.report_path)}")

    def _look(self, run: EditRun) -> None:
        before = self._seconds
        report = self._evaluate(run, limit=self.sample, before=self.unedited)
        self._in_looks += self._seconds - before
        self._scores, self._looked_at = report.flat(), run.step
        self._positions += logged.positions(f"step {run.step}", report)
        self._note_best(run, self._scores)
        run.publish(self._scores)
        run.host.log({**self._scores, **self.best, **self._cost()})
        if self.stop_at is not None and self._scores["edit/reliability"] >= self.stop_at:
            run.stop()

    def _note_best(self, run: EditRun, scores: Mapping[str, float]) -> None:
        names = ("reliability", "locality")
        found = {f"edit/best/{name}": scores[f"edit/{name}"] for name in names if f"edit/{name}" in scores}
        # Reliability first; a tie is the earlier step's.
        if not self.best or list(found.values()) > [self.best[name] for name in found]:
            self.best = {"edit/best/step": float(run.step), **found}

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
                before=before,
                metrics=sorted(self.extras),
                texts=self.texts,
                reference=reference,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                limit=limit,
                prompt_format=self.prompt_format,
                progress=run.host.is_main and len(self._edits) > self.batch_size,
                distributed=self.distributed and is_distributed(),
            )
        self._seconds += time.perf_counter() - began
        return report

    def _whole(self, report: Report) -> Report:
        """With the distributions of all processes: a look deals its sample out anew."""
        if not report.distributions or not self.distributed or not is_distributed():
            return report
        parts: list[Any] = [None] * world_size()
        dist.all_gather_object(parts, dict(report.distributions))
        return replace(report, distributions={prompt: one for part in parts for prompt, one in part.items()})

    def _share(self) -> float:
        return self._in_looks / max(time.perf_counter() - self._began, 1e-9)

    def _too_slow(self) -> bool:
        if self.max_fraction_of_time is None:
            return False
        decided = [self._share() > self.max_fraction_of_time]
        if is_distributed():
            # By one clock: a look that only some of the processes take would not end.
            dist.broadcast_object_list(decided, src=0)
        return decided[0]

    def _cost(self) -> dict[str, float]:
        cost = {"edit/metrics/seconds": self._seconds, "edit/metrics/share_of_time": self._share()}
        return cost if self.max_fraction_of_time is None else {**cost, "edit/metrics/skipped": float(self.skipped)}

    def _settings(self, run: EditRun) -> dict[str, Any]:
        assert self.unedited is not None
        meta = self.unedited.meta
        kept = {name: meta[name] for name in ("data_name", "data_hash", "n_edits", "model", "settings", "versions")}
        return {**kept, "callbacks": [repr(callback) for callback in run.callbacks], "scope": run.describe_scope()}

    def __repr__(self) -> str:
        return f"EditMetrics(every_n_steps={self.every_n_steps}, stop_at={self.stop_at})"


def load_edits(edits: Any) -> Sequence[Edit]:
    """Take edits as they are, or read them from a path."""
    found = EditDataset.load(edits) if isinstance(edits, str | Path) else edits
    if len(found) == 0:
        raise EditError("EditMetrics: the list of edits is empty; there is nothing to edit")
    return found
