"""The rows of a report's score table, and number formats, for every kind of display."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, Score
from kedit_train.evaluation.scoring.metrics import QUESTIONS
from kedit_train.evaluation.scoring.own_endings import CUT_SHARE
from kedit_train.evaluation.scoring.probe_results import ProbeResult
from kedit_train.evaluation.scoring.protocols import EXACT, Protocols

HEADING = "Did it work?"
_NOTES = {
    "leading": "the greedy answer begins with an accepted answer, followed by a word boundary. locality: the first "
    "tokens of the answer are unchanged (as many tokens as the true answer has, at least 3)",
    "exact": "the greedy answer, until the model ends it, equals an accepted answer after normalization",
    "contains": "the greedy answer contains an accepted answer. locality: the first tokens are unchanged",
    "wild": "the greedy answer, until its first full stop or line break, equals an accepted answer after normalization",
    "teacher_forced": "fraction of the answer's tokens that the model ranks first. locality: fraction of positions at "
    "which both models rank the same token first",
    "probability": "the new answer is more probable than the old answer (efficacy score ES and paraphrase score PS of "
    "CounterFact). locality: the true answer is more probable than the new answer (neighborhood score NS of "
    "CounterFact)",
}
_REST = (
    "teacher-forced: fraction of the answer's tokens that the model ranks first. 95 %: confidence interval, bootstrap "
    "over edits. n: number of probes"
)


def protocol_note(report: ReportData) -> str:
    """Return a note that names the report's first protocol and says how this protocol judges answers."""
    protocols = report.protocols
    # No reason is shown for the default protocol.
    reason = protocols.reason if protocols.headline != EXACT.headline else ""
    why = f" (chosen because {reason})" if reason else ""
    score = "score" if protocols.headline in ("teacher_forced", "probability") else "generated"
    return f"protocol: {protocols.headline}{why}. {score}: {_NOTES[protocols.headline]}"


def table_note(report: ReportData) -> str:
    """Return the note below the score table. It explains the protocol and the columns."""
    return f"{protocol_note(report)}. {_REST}"


_NAMED_LABELS = {
    "leading": "leading",
    "exact": "exact",
    "wild": "wild",
    "contains": "contains",
    "probability": "probability",
    "magnitude": "probability: difference",
}


@dataclass(frozen=True, kw_only=True)
class ScoreLine:
    """One line of the table of scores.

    Args:
        label: the text in the first column.
        edited: the score of the model that the report is about.
        unedited: the score of the unedited model.
        teacher_forced: the teacher-forced score on the same probes.
        is_kind: True if the line shows details of a line above it. The label is indented.
        is_headline: True if the line shows the main score of reliability, generality, portability or locality.
        is_fraction: True if the score is between 0 and 1.
    """

    label: str
    edited: Score
    unedited: Score = NO_SCORE
    teacher_forced: Score = NO_SCORE
    is_kind: bool = False
    is_headline: bool = False
    is_fraction: bool = True

    @property
    def basis(self) -> Score:
        """The score whose confidence interval and number of probes are printed in this line of the table.

        This is the score after the edit. If it has no probes, this is the score before the edit.
        """
        return self.edited if self.edited.n else self.unedited


def score_lines(report: ReportData) -> Iterator[ScoreLine]:
    """Yield the lines of the score table: each main metric with its kinds of probes, then the extra metrics."""
    metrics, unedited = report.metrics, report.unedited or {}
    protocols = report.protocols
    for question in QUESTIONS:
        yield from _question_lines(question, metrics[question], unedited.get(question, {}), protocols)
    for name, score in metrics.get("probability", {}).items():
        before = unedited.get("probability", {}).get(name, NO_SCORE)
        yield ScoreLine(label="probability: harmonic mean", unedited=before, edited=score)
    yield from _old_answer_lines(metrics["resurgence"], unedited.get("resurgence", {}))
    if protocols.whole_answers:
        yield ScoreLine(label="answers cut at the limit", unedited=_cut_share(unedited), edited=_cut_share(metrics))
    fluency, unedited_fluency = metrics["fluency"], unedited.get("fluency", {})
    for name, label in (
        ("entropy", "fluency: n-gram entropy"),
        ("repetition", "fluency: repetition"),
        ("ended", "fluency: ended by itself"),
    ):
        if fluency[name].n:
            before = unedited_fluency.get(name, NO_SCORE)
            yield ScoreLine(label=label, unedited=before, edited=fluency[name], is_fraction=name != "entropy")
    for kind, score in metrics.get("overlap", {}).items():
        if score.n:
            label = "overlap with the target (ROUGE-L)" if kind == "prompt" else kind
            before = unedited.get("overlap", {}).get(kind, NO_SCORE)
            yield ScoreLine(label=label, unedited=before, edited=score, is_kind=kind != "prompt")
    if metrics["perplexity"].n:
        unedited_perplexity = unedited.get("perplexity", NO_SCORE)
        score = metrics["perplexity"]
        yield ScoreLine(label="perplexity", unedited=unedited_perplexity, edited=score, is_fraction=False)
    for name, label in (("kl", "prose: KL (nats per token)"), ("agreement", "prose: same top token")):
        if (score := metrics.get("prose", {}).get(name, NO_SCORE)).n:
            yield ScoreLine(label=label, edited=score, is_fraction=name != "kl")
    for question, score in metrics.get("retrieval", {}).items():
        # The baseline has the weights of the unedited model.
        columns = {"edited": score} if report.unedited is None else {"unedited": score, "edited": NO_SCORE}
        yield ScoreLine(label=f"fact in the prompt: {question}", **columns)
    if (score := metrics.get("router", {}).get("kl", NO_SCORE)).n:
        yield ScoreLine(label="routers: KL (nats per token)", edited=score, is_fraction=False)
    for name, score in metrics["weight_drift"].items():
        yield ScoreLine(label=f"weight drift: {name}", edited=score, is_fraction=name == "moved")


def _question_lines(
    question: str, edited: Mapping[str, Any], unedited: Mapping[str, Any], protocols: Protocols
) -> Iterator[ScoreLine]:
    compared = edited.get("compared_with") == "unedited model"
    label = _locality_label(protocols.headline, compared) if question == "locality" else question
    # For the unedited model, a fraction of unchanged answers has no meaning.
    yield ScoreLine(
        label=label,
        unedited=NO_SCORE if compared else unedited.get("generated", NO_SCORE),
        edited=edited["generated"],
        teacher_forced=NO_SCORE if compared else edited["teacher_forced"],
        is_headline=True,
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
    shown = set(protocols.names) - {EXACT.headline if protocols.names == EXACT.names else ""}
    for name, named in _NAMED_LABELS.items():
        if name in edited and name != protocols.headline and edited[name].n and (name in shown or name == "magnitude"):
            # For the unedited model, a fraction of unchanged answers has no meaning. The protocol "probability" does
            # not compare the two models, so its score has a meaning for the unedited model, too.
            before = NO_SCORE if compared and name != "probability" else unedited.get(name, NO_SCORE)
            is_fraction = name != "magnitude"
            yield ScoreLine(label=named, unedited=before, edited=edited[name], is_kind=True, is_fraction=is_fraction)
    if compared:
        if protocols.names != EXACT.names:
            yield ScoreLine(label="locality: first tokens kept", edited=edited.get("tokens_kept", NO_SCORE))
        # Teacher forcing scores the true answer. So its score is shown beside the fraction of right answers.
        yield ScoreLine(
            label="locality: right",
            unedited=unedited.get("right", NO_SCORE),
            edited=edited["right"],
            teacher_forced=edited["teacher_forced"],
        )
        yield ScoreLine(label="locality: right answers kept", edited=edited["kept_right"])
    if question == "locality" and edited["kl"].n:
        yield ScoreLine(label="locality: KL (nats per token)", edited=edited["kl"], is_fraction=False)


def _locality_label(headline: str, compared: bool) -> str:
    if headline == "probability":
        return "locality: true answer preferred"
    if headline == "teacher_forced" and compared:
        return "locality: top tokens unchanged"
    if not compared:
        return "locality: right"
    return "locality: unchanged" if headline in ("exact", "wild") else "locality: first tokens unchanged"


def _old_answer_lines(edited: Mapping[str, Any], unedited: Mapping[str, Any]) -> Iterator[ScoreLine]:
    for name, label in (("says_old", "old answer generated"), ("prefers_old", "old answer preferred")):
        for kind, score in edited[name].items():
            if score.n:
                is_kind = kind != "prompt"
                before = unedited.get(name, {}).get(kind, NO_SCORE)
                yield ScoreLine(label=kind if is_kind else label, unedited=before, edited=score, is_kind=is_kind)


def _cut_share(metrics: Mapping[str, Any]) -> Score:
    """Return the fraction of answers that are cut at the token limit."""
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
    if gate := report.meta.get("gate"):
        lines.append(
            f"the adapter has a gate: it acts only on prompts whose hidden state at the input of block {gate['layer']} "
            f"lies within the radius of one of {gate['keys']} keys. All other prompts, which may include rephrases of "
            "edits, get the answers of the unedited model. Programs other than kedit-train ignore the gate"
        )
    protocols, cut = report.protocols, _cut_share(report.unedited or report.metrics)
    if protocols.headline == "exact" and cut.value is not None and cut.value >= CUT_SHARE:
        better = "leading" if report.meta.get("settings", {}).get("prompt_format") == "plain" else "contains"
        lines.append(
            f"{cut.value:.0%} of the answers are cut at max_new_tokens, so scores of whole answers mean little; set "
            f'protocol="{better}", or a larger max_new_tokens'
        )
    return lines


def answer_lists(report: ReportData) -> list[tuple[str, list[ProbeResult]]]:
    """Return the lists of answers that a report shows, as pairs (title, results). Empty lists are left out.

    The lists contain the edits, the rephrased prompts without the new answer, and the changed answers to other prompts.
    """
    edits = [result for result in report.answers if result.question == "reliability"]
    missed = [result for result in report.answers if result.question == "generality" and result.right is False]
    changed = [result for result in report.answers if result.question == "locality" and result.unchanged is False]
    lists = [
        ("Edits", edits),
        ("Rephrased prompts without the new answer", missed),
        ("Changed answers to other prompts", changed),
    ]
    return [(title, results) for title, results in lists if results]


def reproduction(report: ReportData) -> Iterator[tuple[str, str]]:
    """Yield the metadata that a reader needs to repeat the evaluation, as pairs (name, value)."""
    meta = report.meta
    yield "data", str(meta["data_name"])
    yield "SHA-256 of the data", str(meta["data_hash"])
    yield "seed", str(meta["seed"])
    # The default judge is part of the protocol "exact", and other protocols do not use it.
    settings = {key: value for key, value in meta["settings"].items() if (key, value) != ("judge", "exact_match")}
    yield "settings", ", ".join(f"{key}={value}" for key, value in settings.items())
    yield "versions", ", ".join(f"{key} {value}" for key, value in meta["versions"].items())
    yield "date", str(meta["date"])
    yield "seconds", str(meta["seconds"])


def continuation(result: ProbeResult) -> str:
    """Return "…" if the model did not end its answer, and nothing otherwise.

    The mark is left out if the answer is the same as before the edit, because reports show the answer before the edit
    without a mark.
    """
    return "" if result.ended or result.answer == result.before else "…"


def format_number(value: float | None) -> str:
    """Format a number with three decimals.

    A number that would be rounded to 0 is written in scientific notation. A number of 100 or more is written without
    decimals. None is written as a dash.
    """
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def format_interval(score: Score) -> str:
    """Format the interval of a score as ``0.71–0.93`` or ``-0.30 to -0.05``, or as a dash if there is none."""
    if score.low is None or score.high is None:
        return "–"
    largest = max(abs(score.low), abs(score.high))
    # Small bounds are shown with two significant digits. Otherwise, both bounds could be rounded to the same number.
    form = ".2f" if largest == 0 or 0.1 <= largest < 100 else ".2g" if largest < 0.1 else ".0f"
    low, high = (f"{x:{form}}" for x in (score.low, score.high))
    return f"{low} to {high}" if score.low < 0 else f"{low}–{high}"
