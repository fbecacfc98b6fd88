"""What a report shows, line by line, whatever it is drawn with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.metrics import QUESTIONS

if TYPE_CHECKING:
    from kedit_train.evaluation.report import Report

NONE = Score(None, 0)
NOTE = (
    "generated: greedy, to the model's own end, exact match after normalisation; teacher-forced: share of answer "
    "tokens ranked first; 95 %: bootstrap over edits"
)


@dataclass(frozen=True)
class Line:
    """One line: a label, the score of each model, and the teacher-forced one beside it; ``part`` is one kind."""

    label: str
    unedited: Score
    now: Score
    forced: Score = NONE
    part: bool = False


def score_lines(report: Report) -> Iterator[Line]:
    """Questions with their kinds, then what else was measured. What nobody asked for has no line."""
    metrics, unedited = report.metrics, report.unedited or {}
    for question in QUESTIONS:
        yield from _question(question, metrics[question], unedited.get(question, {}))
    yield from _old_answers(metrics["resurgence"], unedited.get("resurgence", {}))
    yield Line("answers that did not end", _ending(unedited), _ending(metrics))
    fluency, was = metrics["fluency"], unedited.get("fluency", {})
    for name, label in (
        ("entropy", "fluency: n-gram entropy"),
        ("repetition", "fluency: repetition"),
        ("ended", "fluency: ends by itself"),
    ):
        if fluency[name].n:
            yield Line(label, was.get(name, NONE), fluency[name])
    if metrics["perplexity"].n:
        yield Line("perplexity", unedited.get("perplexity", NONE), metrics["perplexity"])
    for name, score in metrics["weight_drift"].items():
        yield Line(f"weight drift: {name}", NONE, score)


def _question(question: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> Iterator[Line]:
    compared = now.get("compared_with") == "unedited model"
    # Before the edit nothing had changed: the share of unchanged answers has no "unedited" figure.
    label = "locality: same answers" if compared else "locality: right" if question == "locality" else question
    yield Line(
        label,
        NONE if compared else then.get("generated", NONE),
        now["generated"],
        NONE if compared else now["teacher_forced"],
    )
    kinds = now.get("by_kind", {})
    for kind, own in kinds.items() if len(kinds) > 1 or (kinds and not now["generated"].n) else ():
        was = NONE if compared else then.get("by_kind", {}).get(kind, {}).get("generated", NONE)
        yield Line(kind, was, own["generated"], NONE if compared else own["teacher_forced"], part=True)
    if compared:
        # Teacher forcing asks for the true answer, so its figure stands beside the share that is right.
        yield Line("locality: right", then.get("right", NONE), now["right"], now["teacher_forced"])
        yield Line("locality: right ones kept", NONE, now["kept_right"])
    if question == "locality" and now["kl"].n:
        yield Line("locality: KL, nats a token", NONE, now["kl"])


def _old_answers(now: Mapping[str, Any], then: Mapping[str, Any]) -> Iterator[Line]:
    for name, label in (("says_old", "old answer: said"), ("prefers_old", "old answer: preferred")):
        kinds = {kind: score for kind, score in now[name].items() if score.n}
        for kind, score in kinds.items():
            was = then.get(name, {}).get(kind, NONE)
            yield Line(label if kind == "prompt" else kind, was, score, part=kind != "prompt")


def _ending(metrics: Mapping[str, Any]) -> Score:
    """The share of answers that were cut, from the share that ended."""
    ended: Score = metrics.get("answers", {}).get("ended", NONE)
    value, low, high = (None if x is None else 1.0 - x for x in (ended.value, ended.high, ended.low))
    return Score(value, ended.n, low, high)


def notes(report: Report) -> list[str]:
    """What a reader must know beside the scores."""
    found = [
        f"{question}: no accepted answer for {n} of the probes, not scored"
        for question, n in report.meta.get("unscored", {}).items()
    ]
    near = report.meta.get("near_ties", 0)
    if near:
        found.append(
            f"{near} of the answers hung on two tokens that are as good as equal: another batch size may choose "
            "the other"
        )
    return found


def figure(value: float | None) -> str:
    """A number with three places, or as many as tell it from 0."""
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def interval(score: Score) -> str:
    """``0.71–0.93``, or a dash where there is none."""
    if score.low is None or score.high is None:
        return "–"
    widest = max(abs(score.low), abs(score.high))
    # Small bounds get significant places, by which they tell from the value that they enclose.
    form = ".2f" if widest == 0 or 0.1 <= widest < 100 else ".2g" if widest < 0.1 else ".0f"
    low, high = (f"{x:{form}}" for x in (score.low, score.high))
    return f"{low}–{high}"
