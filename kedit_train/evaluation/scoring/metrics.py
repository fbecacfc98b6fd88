"""``summarize``: compute the metrics of a report from the results of all probes.

Every score includes the number of probes that it is based on. A metric without probes has the value None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, Score, scores_of_sums, sums_per_edit
from kedit_train.evaluation.scoring.comparison import success
from kedit_train.evaluation.scoring.fluency import ngram_entropy, repetition
from kedit_train.evaluation.scoring.overlap import rouge_l
from kedit_train.evaluation.scoring.probe_results import OPEN, ProbeResult
from kedit_train.evaluation.scoring.protocols import EXACT, Protocols

QUESTIONS = ("reliability", "generality", "portability", "locality")
# The kinds of generality that make up its total. The other kinds are extra metrics and are reported separately.
_TOTAL_GENERALITY = ("rephrase",)

_MEASURES: dict[str, Callable[[ProbeResult], float | None]] = {
    "contains": lambda r: r.contained,
    "teacher_forced": lambda r: r.token_accuracy,
    "teacher_forced_exact": lambda r: all(r.tokens_right) if r.tokens_right else None,
    "target_loss": lambda r: None if r.log_prob is None else -r.log_prob,
    "target_probability": lambda r: (
        sum(map(math.exp, r.token_log_probs)) / len(r.token_log_probs) if r.token_log_probs else None
    ),
    "ended": lambda r: r.ended,
}
# Protocols that give a score only if they are among the report's protocols. The scores of all other protocols are
# always computed; see ``_MEASURES``.
_NAMED = ("leading", "exact", "wild", "probability")


class _Values:
    """Collects the values from which each score is computed. Each value is stored with the number of its edit.

    A score is named by its path in the report, for example ``("locality", "right")``.
    """

    def __init__(self, edits: Sequence[str], seed: int) -> None:
        self.numbers = {edit: i for i, edit in enumerate(edits)}
        self.seed = seed
        self.values: dict[tuple[str, ...], list[tuple[int, float]]] = {}

    def add(self, path: tuple[str, ...], results: Sequence[ProbeResult], measure: Callable[[ProbeResult], Any]) -> None:
        """Add ``measure(result)`` for every result, unless the measured value is None."""
        measured = [(self.numbers[result.edit], measure(result)) for result in results]
        self.values.setdefault(path, []).extend((edit, float(v)) for edit, v in measured if v is not None)

    def write_scores(self, tree: dict[str, Any]) -> None:
        """Compute all scores and put each into ``tree`` under its path."""
        sums = [
            sums_per_edit([edit for edit, _ in values], [value for _, value in values], n_edits=len(self.numbers))
            for values in self.values.values()
        ]
        for path, score in zip(self.values, scores_of_sums(sums, self.seed), strict=True):
            branch = tree
            for name in path[:-1]:
                branch = branch.setdefault(name, {})
            branch[path[-1]] = score


def summarize(
    results: Sequence[ProbeResult], *, against_unedited: bool, protocols: Protocols = EXACT, seed: int = 0
) -> dict[str, Any]:
    """Compute the metrics of a report from the results of all probes.

    Reliability, generality, portability and locality each have the scores below. The preferred answer of a probe is the
    first of its accepted answers.

    - ``generated``: the score under the report's first protocol (the headline score). With the default protocol
      "exact", it is the fraction of probes with a right answer. For locality with ``against_unedited``, it is the
      fraction of answers that are equal to the unedited model's answers;
    - ``leading``, ``exact``, ``wild`` and ``probability``: the score under this protocol, if ``protocols`` contains
      it. If "exact" is the only protocol, the key ``exact`` is left out, because ``generated`` is this score;
    - ``magnitude`` (with the protocol "probability"): the mean difference between the probabilities per token of two
      answers. For reliability and generality, it is P(new answer) - P(old answer). For locality, it is P(right answer
      to the probe) - P(new answer of the edit);
    - ``contains``: the fraction of answers that contain an accepted answer;
    - ``teacher_forced``: the mean fraction of the preferred answer's tokens that are ranked first;
    - ``teacher_forced_exact``: the fraction of probes where all tokens of the preferred answer are ranked first;
    - ``target_loss`` and ``target_probability``: loss and probability of the preferred answer's tokens, averaged over
      the tokens of a probe and then over the probes;
    - ``ended``: the fraction of answers that the model ended itself. It has no value if the protocols generate only the
      first tokens of an answer;
    - ``by_kind`` (not for reliability): all scores above, for each kind of probe. Extra metrics add kinds of generality
      probes, for example prompts with a prefix. These kinds have scores only in ``by_kind``. All other generality
      scores are computed from the rephrases alone.

    The result also contains these scores:

    - ``locality.right``: the fraction of locality probes with a right answer, whether or not the edit changed the
      answer;
    - ``locality.kept_right``: as ``locality.right``, but only for the probes that the unedited model answered
      correctly;
    - ``locality.tokens_kept``: the fraction of the unedited model's first tokens that come before the first difference
      between both models' answers, averaged over the probes;
    - ``locality.same_answer``: the fraction of whole answers that are equal to the unedited model's answers;
    - ``probability.harmonic_mean``: the harmonic mean of three scores: the "probability" scores of reliability,
      generality and locality. CounterFact calls this mean S;
    - ``retrieval``: the unedited model's headline scores with the new fact in front of each prompt. There is one score
      each for reliability, generality, portability and locality;
    - ``locality.kl``: the mean KL divergence from the unedited model, in nats per token;
    - ``positions``: accuracy, loss and probability of the edits' targets by token position, with the keys "1", "2" and
      so on;
    - ``resurgence``: how often the old answer is generated (``says_old``), and how often it is more probable than the
      new answer (``prefers_old``), by kind of probe;
    - ``fluency``: entropy and repetition of the continuations of the edits' prompts;
    - ``overlap``: ROUGE-L between the generated texts and the whole targets, for the edits' own prompts (``prompt``)
      and for their rephrases (``rephrase``).

    Args:
        results: the results of all probes.
        against_unedited: True if ``results`` contain the unedited model's answers.
        protocols: the protocols of the results.
        seed: seed of the bootstrap over edits.

    Returns:
        A nested dict whose leaves are :class:`~kedit_train.evaluation.Score` objects. The one exception is
        ``locality.compared_with``, which is "unedited model" or "truth".
    """
    values = _Values(list(dict.fromkeys(result.edit for result in results)), seed)
    metrics: dict[str, Any] = {}
    for question in QUESTIONS:
        own = [result for result in results if result.question == question]
        compared = against_unedited and question == "locality"
        measures = _measures(protocols, compared)
        metrics[question] = {}
        total = [r for r in own if question != "generality" or r.kind in _TOTAL_GENERALITY]
        _add_question(values, (question,), total, measures)
        if question == "locality":
            with_unedited = compared and protocols.headline != "probability"
            metrics[question]["compared_with"] = "unedited model" if with_unedited else "truth"
            values.add((question, "tokens_kept"), own, lambda r: r.tokens_kept)
            values.add((question, "same_answer"), own, lambda r: r.same_answer)
            values.add((question, "right"), own, _right)
            values.add((question, "kept_right"), [r for r in own if r.right_before], _right)
            _add_kl(values, (question, "kl"), own)
        if question != "reliability":
            metrics[question]["by_kind"] = {}
            for kind in sorted({result.kind for result in own}):
                _add_question(values, (question, "by_kind", kind), [r for r in own if r.kind == kind], measures)
                if question == "locality":
                    _add_kl(values, (question, "by_kind", kind, "kl"), [r for r in own if r.kind == kind])
    _add_positions(values, [r for r in results if r.question == "reliability"])
    _add_resurgence(values, results)
    asked = [r for r in results if r.question not in (*OPEN, "retrieval")] if protocols.whole_answers else []
    values.add(("answers", "ended"), asked, lambda r: r.ended)
    for question in QUESTIONS:
        if own := [r for r in results if r.question == "retrieval" and r.kind == question]:
            values.add(("retrieval", question), own, _headline(protocols, against_unedited=True))
    continuations = [r for r in results if r.question == "fluency"]
    values.add(("fluency", "entropy"), continuations, lambda r: ngram_entropy(r.answer))
    values.add(("fluency", "repetition"), continuations, lambda r: repetition(r.answer))
    values.add(("fluency", "ended"), continuations, lambda r: r.ended)
    for kind in ("prompt", "rephrase"):
        own = [r for r in results if r.question == "overlap" and r.kind == kind]
        values.add(("overlap", kind), own, lambda r: rouge_l(r.answer, r.accepted))
    values.write_scores(metrics)
    metrics["reliability"]["smallest_token_probability"] = _smallest_token_probability(results)
    if "probability" in protocols.names:
        parts = [metrics[question]["probability"] for question in ("reliability", "generality", "locality")]
        metrics["probability"] = {"harmonic_mean": _harmonic_mean(parts)}
    return metrics


def _headline(protocols: Protocols, against_unedited: bool) -> Callable[[ProbeResult], float | None]:
    return lambda r: success(protocols.headline, r, headline=True, against_unedited=against_unedited)


def _measures(protocols: Protocols, against_unedited: bool) -> dict[str, Callable[[ProbeResult], float | None]]:
    """Return a dict from the name of each score to the function that computes the score for one probe."""
    measures = {"generated": _headline(protocols, against_unedited), **_MEASURES}
    if not protocols.whole_answers:
        measures["ended"] = lambda r: None
    for position, name in enumerate(protocols.names if protocols.names != EXACT.names else ()):
        if name in _NAMED:
            measures[name] = lambda r, name=name, first=position == 0: success(
                name, r, headline=first, against_unedited=against_unedited
            )
    if "probability" in protocols.names:
        measures["magnitude"] = lambda r: r.magnitude
    return measures


def _harmonic_mean(scores: Sequence[Score]) -> Score:
    """Return the harmonic mean of the scores, or no score if one of them is missing."""
    values = [score.value for score in scores if score.value is not None]
    if len(values) < len(scores):
        return NO_SCORE
    mean = len(values) / sum(1 / value for value in values) if all(values) else 0.0
    return Score(mean, n=sum(score.n for score in scores))


def _right(result: ProbeResult) -> bool | None:
    return result.right


def _add_question(
    values: _Values,
    path: tuple[str, ...],
    results: Sequence[ProbeResult],
    measures: dict[str, Callable[[ProbeResult], float | None]],
) -> None:
    for name, measure in measures.items():
        values.add((*path, name), results, measure)


def _add_kl(values: _Values, path: tuple[str, ...], results: Sequence[ProbeResult]) -> None:
    values.add(path, (), _right)
    for position in range(max((len(r.kl) for r in results), default=0)):
        values.add(path, [r for r in results if len(r.kl) > position], lambda r, i=position: r.kl[i])


def _add_positions(values: _Values, results: Sequence[ProbeResult]) -> None:
    for position in range(max((len(r.tokens_right) for r in results), default=0)):
        own, path = [r for r in results if len(r.tokens_right) > position], ("positions", str(position + 1))
        values.add((*path, "accuracy"), own, lambda r, i=position: r.tokens_right[i])
        values.add((*path, "loss"), own, lambda r, i=position: -r.token_log_probs[i])
        values.add((*path, "probability"), own, lambda r, i=position: math.exp(r.token_log_probs[i]))


def _add_resurgence(values: _Values, results: Sequence[ProbeResult]) -> None:
    by_kind = {
        "prompt": [r for r in results if r.question == "reliability"],
        "rephrase": [r for r in results if r.question == "generality" and r.kind == "rephrase"],
        "negation": [r for r in results if r.question == "resurgence" and r.kind == "negation"],
        "choice": [r for r in results if r.question == "resurgence" and r.kind == "choice"],
    }
    for kind, own in by_kind.items():
        if kind != "choice":
            values.add(("resurgence", "says_old", kind), own, lambda r: r.says_old)
        values.add(("resurgence", "prefers_old", kind), own, lambda r: r.prefers_old)


def _smallest_token_probability(results: Sequence[ProbeResult]) -> Score:
    """Return the smallest probability over all target tokens of all edits. A mean would hide one failed token."""
    log_probs = [p for r in results if r.question == "reliability" for p in r.token_log_probs]
    return Score(math.exp(min(log_probs)), n=len(log_probs)) if log_probs else NO_SCORE
