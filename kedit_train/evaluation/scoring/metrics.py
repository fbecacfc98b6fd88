"""``summarize``: compute the metrics of a report from the results of all probes.

Every score includes the number of probes that it is based on. A metric without probes has the value None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, MeanOverEdits, Score, scores_of_means
from kedit_train.evaluation.scoring.fluency import ngram_entropy, repetition
from kedit_train.evaluation.scoring.probe_results import ProbeResult

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


class _Values:
    """Collects values by their path in the report. Each value is stored with the number of its edit."""

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
        means = []
        for values in self.values.values():
            # Every process has all results. Synchronization would hang if only one process evaluates.
            mean = MeanOverEdits(len(self.numbers), seed=self.seed, sync_on_compute=False)
            mean.update([edit for edit, _ in values], [value for _, value in values])
            means.append(mean)
        for path, score in zip(self.values, scores_of_means(means, self.seed), strict=True):
            branch = tree
            for name in path[:-1]:
                branch = branch.setdefault(name, {})
            branch[path[-1]] = score


def summarize(results: Sequence[ProbeResult], *, against_unedited: bool, seed: int = 0) -> dict[str, Any]:
    """Compute the metrics of a report from the results of all probes.

    Reliability, generality, portability and locality each have these scores:

    - ``generated``: the fraction of probes whose generated answer is right. For locality with ``against_unedited``, it
      is the fraction of answers that equal the unedited model's answer after normalization;
    - ``contains``: the fraction of answers that contain an accepted answer;
    - ``teacher_forced``: the mean fraction of the preferred answer's tokens that are ranked first;
    - ``teacher_forced_exact``: the fraction of probes where all tokens of the preferred answer are ranked first;
    - ``target_loss`` and ``target_probability``: loss and probability of the preferred answer's tokens, averaged over
      the tokens of a probe and then over the probes;
    - ``ended``: the fraction of answers that the model ended itself;
    - ``by_kind`` (not for reliability): all scores above, for each kind of probe. The generality scores outside
      ``by_kind`` include only rephrasings, so they do not depend on the extra metrics.

    The result also contains these scores:

    - ``locality.right``: the fraction of locality probes with a right answer, even if the edit changed the answer;
    - ``locality.kept_right``: as ``locality.right``, but only for the probes that the unedited model answered
      correctly;
    - ``locality.kl``: the mean KL divergence per token from the unedited model;
    - ``positions``: accuracy, loss and probability of the edits' targets by token position, with the keys "1", "2" and
      so on;
    - ``resurgence``: how often the old answer is generated (``says_old``) or more probable (``prefers_old``), by kind
      of probe;
    - ``fluency``: entropy and repetition of the continuations of the edits' prompts.

    Args:
        results: the results of all probes.
        against_unedited: True if ``results`` contain the unedited model's answers.
        seed: seed of the bootstrap over edits.

    Returns:
        A nested dict whose leaves are :class:`~kedit_train.evaluation.Score` objects.
    """
    values = _Values(list(dict.fromkeys(result.edit for result in results)), seed)
    metrics: dict[str, Any] = {}
    for question in QUESTIONS:
        own = [result for result in results if result.question == question]
        is_success = _unchanged if against_unedited and question == "locality" else _right
        metrics[question] = {}
        total = [r for r in own if question != "generality" or r.kind in _TOTAL_GENERALITY]
        _add_question(values, (question,), total, is_success)
        if question == "locality":
            metrics[question]["compared_with"] = "unedited model" if against_unedited else "truth"
            values.add((question, "right"), own, _right)
            values.add((question, "kept_right"), [r for r in own if r.right_before], _right)
            _add_kl(values, (question, "kl"), own)
        if question != "reliability":
            metrics[question]["by_kind"] = {}
            for kind in sorted({result.kind for result in own}):
                _add_question(values, (question, "by_kind", kind), [r for r in own if r.kind == kind], is_success)
                if question == "locality":
                    _add_kl(values, (question, "by_kind", kind, "kl"), [r for r in own if r.kind == kind])
    _add_positions(values, [r for r in results if r.question == "reliability"])
    _add_resurgence(values, results)
    values.add(("answers", "ended"), [r for r in results if r.question != "fluency"], lambda r: r.ended)
    continuations = [r for r in results if r.question == "fluency"]
    values.add(("fluency", "entropy"), continuations, lambda r: ngram_entropy(r.answer))
    values.add(("fluency", "repetition"), continuations, lambda r: repetition(r.answer))
    values.add(("fluency", "ended"), continuations, lambda r: r.ended)
    values.write_scores(metrics)
    metrics["reliability"]["smallest_token_probability"] = _smallest_token_probability(results)
    return metrics


def _right(result: ProbeResult) -> bool | None:
    return result.right


def _unchanged(result: ProbeResult) -> bool | None:
    return result.unchanged


def _add_question(
    values: _Values, path: tuple[str, ...], results: Sequence[ProbeResult], is_success: Callable[[Any], Any]
) -> None:
    values.add((*path, "generated"), results, is_success)
    for name, measure in _MEASURES.items():
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
    """Return the smallest probability of a target token in all edits. A mean would hide one failed token."""
    log_probs = [p for r in results if r.question == "reliability" for p in r.token_log_probs]
    return Score(math.exp(min(log_probs)), n=len(log_probs)) if log_probs else NO_SCORE
