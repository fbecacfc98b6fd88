"""Did it take? What the model answers before, during and after the edit, where the host logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.run import EditRun
from kedit_train.data import Edit, EditDataset
from kedit_train.data.tokenise import context_length
from kedit_train.errors import EditError
from kedit_train.evaluation import Report, evaluate


class EditMetrics(EditCallback):
    """Ask the model, greedily and to its own end of text, what it was edited to answer and what it was to leave alone.

    The unedited model is asked first, then a sample of the edits during training, then all of them at the end. The
    scores (``edit/reliability``, ``edit/generality``, ``edit/portability``, ``edit/locality``, each with its
    teacher-forced neighbour) appear in the host's progress bar and loggers, with a table of answers at the end.

    Args:
        edits: an ``EditDataset``, a sequence of ``Edit``, or a path that ``EditDataset.load`` reads; None takes the
            ``.edits`` of Lightning's data module.
        every_n_steps: optimizer steps between two looks; 0 looks at the end only.
        stop_at: end training at this reliability of the sample.
        sample: edits for each look during training, drawn once; None takes all.
        batch_size: prompts generated together.
        max_new_tokens: the longest answer.
        report: where to write the final report as JSON.
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        show: print the table at the end.
    """

    order = 60

    single = "give one of them all the edits"

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
    ) -> None:
        if every_n_steps < 0 or (sample is not None and sample < 1):
            raise EditError(f"EditMetrics: every_n_steps={every_n_steps}, sample={sample}: expected >= 0 and >= 1")
        if stop_at is not None and not (0.0 < stop_at <= 1.0 and every_n_steps):
            raise EditError(f"EditMetrics: stop_at={stop_at} needs a reliability in (0, 1] and every_n_steps > 0")
        self.edits, self.every_n_steps, self.stop_at, self.sample = edits, every_n_steps, stop_at, sample
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.report_path, self.tokenizer, self.show = report, tokenizer, show
        self.unedited: Report | None = None
        self.report: Report | None = None

    def prepare(self, run: EditRun) -> None:
        run.causal("EditMetrics")
        edits = run.host.edits() if self.edits is None else self.edits
        if edits is None:
            raise EditError(
                f"EditMetrics: this {run.host.name} run holds no edits of its own (a data module with .edits does); "
                "give edits=, a path or an EditDataset"
            )
        self._edits = load_edits(edits)
        run.edits = self._edits

    def attach(self, run: EditRun) -> None:
        self.report, self._looked_at = None, -1
        self._tokenizer = run.tokenizer("EditMetrics", self.tokenizer)
        # Hosts that tokenise by themselves would cut or drop an edit that is too long.
        edits = self._edits if isinstance(self._edits, EditDataset) else EditDataset(self._edits)
        edits.encode(self._tokenizer, max_length=context_length(run.model.config))
        with run.unedited():
            self.unedited = self._evaluate(run, limit=None, before=None)

    def after_step(self, run: EditRun) -> None:
        if not self.every_n_steps or run.step % self.every_n_steps:
            return
        report = self._evaluate(run, limit=self.sample, before=self.unedited)
        scores = report.flat()
        run.publish(scores)
        run.host.log(scores)
        if self.stop_at is not None and scores["edit/reliability"] >= self.stop_at:
            run.stop()

    def finish(self, run: EditRun) -> None:
        self.report = report = self._evaluate(run, limit=None, before=self.unedited, scope=run.describe_scope())
        scores = report.flat()
        run.publish(scores)
        run.host.log(scores, last=True)
        rows = report.answers_table()
        columns = list(rows[0])
        run.host.log_table("edit/answers", columns, [[row[c] for c in columns] for row in rows])
        if not run.host.is_main:
            return
        if self.show:
            report.print()
        if self.report_path is not None:
            print(f"report: {report.save(self.report_path)}")

    def _evaluate(self, run: EditRun, *, limit: int | None, before: Report | None, **meta: Any) -> Report:
        with run.host.forward_context():
            report = evaluate(
                run.model,
                self._tokenizer,
                self._edits,
                before=before,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                limit=limit,
                progress=run.host.is_main and len(self._edits) > self.batch_size,
            )
        if not meta:
            return report
        meta |= {"steps": run.step, "callbacks": [repr(callback) for callback in run.callbacks]}
        return replace(report, meta={**report.meta, **meta})

    def __repr__(self) -> str:
        return f"EditMetrics(every_n_steps={self.every_n_steps}, stop_at={self.stop_at})"


def load_edits(edits: Any) -> Sequence[Edit]:
    """Take edits as they are, or read them from a path."""
    found = EditDataset.load(edits) if isinstance(edits, str | Path) else edits
    if len(found) == 0:
        raise EditError("EditMetrics: the list of edits is empty; there is nothing to edit")
    return found
