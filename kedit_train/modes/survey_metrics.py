"""The six metrics of a survey on knowledge editing, computed from the results of ``run_edits``.

The survey is Wang et al., "Knowledge Editing for Large Language Models: A Survey", arXiv 2310.16218.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.reporting.html_elements import fragment, page
from kedit_train.evaluation.reporting.markdown import markdown_table
from kedit_train.evaluation.reporting.report_lines import format_interval, format_number
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, Score, mean_score
from kedit_train.modes.html_results import render_table
from kedit_train.modes.result import ModeResult, write_text

TITLE = "Six metrics of knowledge editing"
COLUMNS = ("metric", "mode", "value", "95 % CI", "n")


@dataclass(frozen=True, kw_only=True, repr=False)
class SurveyMetrics:
    """The six scores of a survey on knowledge editing (see References).

    A score that was not measured has the value None.

    Args:
        accuracy: fraction of edit prompts with the new answer (reliability).
        locality: fraction of unchanged answers to prompts about facts that are not edited.
        generality: fraction of rephrased prompts with the new answer.
        portability: fraction of questions about consequences of the edit that are answered correctly.
        retainability: mean change of accuracy per additional edit in a sequence. The best value is 0.
        scalability: accuracy of edits that are each made alone on the unedited model, minus the accuracy when all edits
            are made at once. The best value is 0.
        sources: dict from the name of each metric to the mode whose result is used, for example "batch". For
            scalability, which needs two results, the entry is "single, batch". If a result is missing, the entry is
            "–".

    References:
        Wang et al., "Knowledge Editing for Large Language Models: A Survey", arXiv 2310.16218.

    Example:
        >>> from kedit_train.evaluation import Score
        >>> from kedit_train.modes import SurveyMetrics
        >>> score, none = Score(0.5, n=4, low=0.0, high=1.0), Score(None, n=0)
        >>> names = ("accuracy", "locality", "generality", "portability", "retainability", "scalability")
        >>> metrics = SurveyMetrics(**dict.fromkeys(names, none) | {"accuracy": score}, sources={"accuracy": "batch"})
        >>> print(metrics.markdown())
        | metric | mode | value | 95 % CI | n |
        |---|---|---:|---:|---:|
        | accuracy | batch | 0.500 | 0.00–1.00 | 4 |
    """

    accuracy: Score
    locality: Score
    generality: Score
    portability: Score
    retainability: Score
    scalability: Score
    sources: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, numbers and strings."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """Return one row per metric: its name, mode, value, interval and number of probes."""
        rows = []
        for name, mode in self.sources.items():
            score: Score = getattr(self, name)
            rows.append([name, mode, _signed(score), format_interval(score), str(score.n)])
        return rows

    def markdown(self) -> str:
        """Return the scores as a Markdown table: metric, mode, value, interval, number of probes."""
        return "\n".join(markdown_table(COLUMNS, self.rows(), 2))

    def html(self) -> str:
        """Return the table as a complete HTML page."""
        return page(TITLE, render_table(TITLE, COLUMNS, self.rows(), text_columns=2))

    def _repr_html_(self) -> str:
        return fragment(render_table(TITLE, COLUMNS, self.rows(), text_columns=2))

    def __repr__(self) -> str:
        """Return one line with the metrics that were measured."""
        return f"SurveyMetrics({', '.join(f'{row[0]} {row[2]}' for row in self.rows() if row[2] != '–')})"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the scores to ``path``, as Markdown (``.md``), HTML (``.html``) or JSON (any other file ending)."""
        return write_text(path, self)


def survey(*results: ModeResult) -> SurveyMetrics:
    """Compute the six metrics of :class:`SurveyMetrics` from one or more results on the same edits.

    Accuracy, locality, generality and portability come from the last checkpoint of the first result. Retainability
    needs a result of the mode "sequential" (or "streaming") with at least two checkpoints. Scalability needs results of
    the modes "single" and "batch".

    Args:
        results: results of :func:`~kedit_train.modes.run_edits`, at most one result per mode.

    Raises:
        EditError: there are no results, there are two results of one mode, or the results differ in the edits, the
            model or the evaluation settings.

    Example:
        >>> from kedit_train import EditDataset, run_edits, survey, world
        >>> from kedit_train.modes import TrainLoop
        >>> model, tokenizer = world.load()
        >>> train = TrainLoop(tokenizer, epochs=2)
        >>> edits = EditDataset.load("world", limit=2)
        >>> result = run_edits(model, tokenizer, edits, mode="sequential", train=train, progress=False)
        >>> metrics = survey(result)
        >>> metrics.sources["retainability"], metrics.scalability.value
        ('sequential', None)
    """
    with reported_by("survey"):
        _check_comparable(results)
        by_mode = {result.mode: result for result in results}
        first = results[0]
        metrics = first.report.metrics
        sequence = by_mode.get("sequential") or by_mode.get("streaming")
        retained, scaled = NO_SCORE, NO_SCORE
        if sequence is not None and len(sequence.checkpoints) > 1:
            scores = {c.edits: c.report.metrics["reliability"]["generated"] for c in sequence.checkpoints}
            accuracy = {count: score.value for count, score in scores.items() if score.value is not None}
            retained = Score(retainability(accuracy), n=max(accuracy))
        if "single" in by_mode and "batch" in by_mode:
            scaled = scalability(by_mode["single"].report, by_mode["batch"].report, seed=first.meta["seed"])
    return SurveyMetrics(
        accuracy=metrics["reliability"]["generated"],
        locality=metrics["locality"]["generated"],
        generality=metrics["generality"]["generated"],
        portability=metrics["portability"]["generated"],
        retainability=retained,
        scalability=scaled,
        sources={
            **dict.fromkeys(("accuracy", "locality", "generality", "portability"), first.mode),
            "retainability": "–" if sequence is None else sequence.mode,
            "scalability": "single, batch" if scaled.n else "–",
        },
    )


def _check_comparable(results: tuple[ModeResult, ...]) -> None:
    if not results:
        raise EditError("results must contain at least one result of run_edits, got none.")
    if len({result.mode for result in results}) < len(results):
        raise EditError(
            "results must contain at most one result per mode, got several for one mode; pass one result for each mode."
        )
    for name in ("data_hash", "model", "settings"):
        if any(result.meta[name] != results[0].meta[name] for result in results):
            raise EditError(
                f"the results differ in {name} and cannot be compared; run all modes on the same edits and model, with "
                "the same evaluation options."
            )


def retainability(accuracy: Mapping[int, float]) -> float:
    """Return the mean change of accuracy per additional edit.

    Let Acc(i) be the accuracy on the first i edits, measured directly after the i-th edit. For n edits, the definition
    is ``1 / (n - 1) * sum over i of (Acc(i + 1) - Acc(i))``. Most terms of the sum cancel, so the result depends
    only on the first and the last accuracy.

    Args:
        accuracy: dict from the number of edits so far to the accuracy on these edits, with at least two entries.

    Returns:
        The change of accuracy per additional edit. It is negative if earlier edits are lost.

    Raises:
        EditError: there are fewer than two entries.

    Example:
        >>> from kedit_train.modes import retainability
        >>> retainability({1: 1.0, 11: 0.5})
        -0.05
    """
    first, last = min(accuracy), max(accuracy)
    if first == last:
        raise EditError(
            "accuracy must have at least two entries {number of edits: accuracy}, got one; evaluate the model at more "
            "checkpoints."
        )
    return (accuracy[last] - accuracy[first]) / (last - first)


def scalability(single: Report, batch: Report, *, seed: int = 0) -> Score:
    """Return the accuracy of single edits minus the accuracy of batch edits.

    Single edits are each made alone on the unedited model. Batch edits are all made at once. The difference is computed
    for each edit and then averaged. The score has a bootstrap interval over edits.

    Args:
        single: the report of the mode "single", where each edit is made on the unedited model.
        batch: the report of the mode "batch", where all edits are made at once.
        seed: seed of the bootstrap.

    Raises:
        EditError: the reports are on different edits.
    """
    alone, together = (
        {r.edit: bool(r.right) for r in report.answers if r.question == "reliability"} for report in (single, batch)
    )
    if alone.keys() != together.keys():
        raise EditError("single= and batch= are reports on different edits; run both modes on the same edits.")
    return mean_score([float(right) - float(together[edit]) for edit, right in alone.items()], seed)


def _signed(score: Score) -> str:
    negative = score.value is not None and score.value < 0
    return f"-{format_number(-score.value)}" if negative else format_number(score.value)  # type: ignore[operator]
