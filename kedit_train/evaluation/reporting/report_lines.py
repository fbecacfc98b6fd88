"""The rows of a report's score table, and number formats, for every kind of display."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, Score
from kedit_train.evaluation.scoring.metrics import QUESTIONS

HEADING = "Did it work?"
NOTE = (
    "generated: greedy decoding until the model ends its answer, exact match after normalization. teacher-forced: "
    "fraction of the answer's tokens that the model ranks first. 95 %: confidence interval, bootstrap over edits. n: "
    "number of probes"
)


@dataclass(frozen=True, kw_only=True)
class ScoreLine:
    """One line of the table of scores.

    Args:
        label: the text in the first column.
        edited: the score of the model that the report is about.
        unedited: the score of the unedited model.
        teacher_forced: the teacher-forced score on the same probes.
        is_kind: True if the line is about one kind of probe. The line is then shown below the line of its metric.
    """

    label: str
    edited: Score
    unedited: Score = NO_SCORE
    teacher_forced: Score = NO_SCORE
    is_kind: bool = False


def score_lines(report: ReportData) -> Iterator[ScoreLine]:
    """Yield the lines of the score table: each main metric with its kinds of probes, then the extra metrics."""
    metrics, unedited = report.metrics, report.unedited or {}
    for question in QUESTIONS:
        yield from _question_lines(question, metrics[question], unedited.get(question, {}))
    yield from _old_answer_lines(metrics["resurgence"], unedited.get("resurgence", {}))
    yield ScoreLine(label="answers cut at the limit", unedited=_cut_share(unedited), edited=_cut_share(metrics))
    fluency, unedited_fluency = metrics["fluency"], unedited.get("fluency", {})
    for name, label in (
        ("entropy", "fluency: n-gram entropy"),
        ("repetition", "fluency: repetition"),
        ("ended", "fluency: ended by itself"),
    ):
        if fluency[name].n:
            yield ScoreLine(label=label, unedited=unedited_fluency.get(name, NO_SCORE), edited=fluency[name])
    if metrics["perplexity"].n:
        unedited_perplexity = unedited.get("perplexity", NO_SCORE)
        yield ScoreLine(label="perplexity", unedited=unedited_perplexity, edited=metrics["perplexity"])
    for name, score in metrics["weight_drift"].items():
        yield ScoreLine(label=f"weight drift: {name}", edited=score)


def _question_lines(question: str, edited: Mapping[str, Any], unedited: Mapping[str, Any]) -> Iterator[ScoreLine]:
    compared = edited.get("compared_with") == "unedited model"
    label = "locality: unchanged" if compared else "locality: right" if question == "locality" else question
    # The unedited model has no fraction of unchanged answers.
    yield ScoreLine(
        label=label,
        unedited=NO_SCORE if compared else unedited.get("generated", NO_SCORE),
        edited=edited["generated"],
        teacher_forced=NO_SCORE if compared else edited["teacher_forced"],
    )
    kinds = edited.get("by_kind", {})
    for kind, own in kinds.items() if len(kinds) > 1 or (kinds and not edited["generated"].n) else ():
        before = unedited.get("by_kind", {}).get(kind, {}).get("generated", NO_SCORE)
        yield ScoreLine(
            label=kind,
            unedited=NO_SCORE if compared else before,
            edited=own["generated"],
            teacher_forced=NO_SCORE if compared else own["teacher_forced"],
            is_kind=True,
        )
    if compared:
        # Teacher forcing scores the true answer, so its score belongs to the fraction of right answers.
        yield ScoreLine(
            label="locality: right",
            unedited=unedited.get("right", NO_SCORE),
            edited=edited["right"],
            teacher_forced=edited["teacher_forced"],
        )
        yield ScoreLine(label="locality: still right", edited=edited["kept_right"])
    if question == "locality" and edited["kl"].n:
        yield ScoreLine(label="locality: KL (nats per token)", edited=edited["kl"])


def _old_answer_lines(edited: Mapping[str, Any], unedited: Mapping[str, Any]) -> Iterator[ScoreLine]:
    for name, label in (("says_old", "old answer generated"), ("prefers_old", "old answer preferred")):
        for kind, score in edited[name].items():
            if score.n:
                is_kind = kind != "prompt"
                before = unedited.get(name, {}).get(kind, NO_SCORE)
                yield ScoreLine(label=kind if is_kind else label, unedited=before, edited=score, is_kind=is_kind)


def _cut_share(metrics: Mapping[str, Any]) -> Score:
    """Return the fraction of answers that were cut, computed from the fraction that ended."""
    ended: Score = metrics.get("answers", {}).get("ended", NO_SCORE)
    value, low, high = (None if x is None else 1.0 - x for x in (ended.value, ended.high, ended.low))
    return Score(value, n=ended.n, low=low, high=high)


def notes(report: ReportData) -> list[str]:
    """Return notes that a reader needs to interpret the scores."""
    lines = [
        f"{question}: {n} probes have no accepted answer and are not scored"
        for question, n in report.meta.get("unscored", {}).items()
    ]
    ties = report.meta.get("near_ties", 0)
    if ties:
        lines.append(
            f"{ties} answers depend on two tokens with almost equal logits; another batch size may change these answers"
        )
    return lines


def format_number(value: float | None) -> str:
    """Format a number with three decimals.

    A number that would be rounded to 0 is written in scientific notation. A number of 100 or more is written without
    decimals. None is written as a dash.
    """
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def format_interval(score: Score) -> str:
    """Format the interval of a score as ``0.71–0.93``, or as a dash if there is none."""
    if score.low is None or score.high is None:
        return "–"
    largest = max(abs(score.low), abs(score.high))
    # Small bounds are shown with two significant digits. Otherwise, both bounds could be rounded to the same number.
    form = ".2f" if largest == 0 or 0.1 <= largest < 100 else ".2g" if largest < 0.1 else ".0f"
    low, high = (f"{x:{form}}" for x in (score.low, score.high))
    return f"{low}–{high}"
