"""From answers to scores. Every score carries the number of probes behind it; no probes is no score, not 0 or 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_train.evaluation.asking.probes import Asked
from kedit_train.evaluation.scoring.bootstrap import EditMean, Score, scores_of
from kedit_train.evaluation.scoring.fluency import ngram_entropy, repetition
from kedit_train.evaluation.scoring.normalize import contains

QUESTIONS = ("reliability", "generality", "portability", "locality")
# Of generality, what counts as such; the other kinds depend on what was asked for and are reported beside it.
HEADLINE = ("rephrase",)


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Asked):
    """One question that was put to the model, and what came back.

    Args:
        answer: what it generated.
        ended: whether it ended the answer itself.
        margin: how close, in logits, the closest choice between two tokens was; None where nothing was chosen.
        right: whether the answer is one of ``accepted``; ``None`` where there are none.
        contained: whether one of ``accepted`` stands in the answer; ``None`` where there are none.
        before: the unedited model's answer; ``None`` where it was not given.
        right_before: whether that was right.
        unchanged: whether the two are the same after normalisation, right or wrong.
        tokens_right: per token of the preferred answer, whether it is first choice under teacher forcing.
        token_log_probs: the same, its log-probability.
        old_log_prob: mean log-probability of the old answer's tokens, where it was asked for.
        kl: per token of the unedited model's answer, KL(unedited || this model), where it was asked for.
    """

    answer: str
    ended: bool
    margin: float | None = None
    right: bool | None = None
    contained: bool | None = None
    before: str | None = None
    right_before: bool | None = None
    unchanged: bool | None = None
    tokens_right: tuple[bool, ...] = ()
    token_log_probs: tuple[float, ...] = ()
    old_log_prob: float | None = None
    kl: tuple[float, ...] = ()

    @property
    def token_accuracy(self) -> float | None:
        """Share of the preferred answer's tokens that are first choice under teacher forcing."""
        return sum(self.tokens_right) / len(self.tokens_right) if self.tokens_right else None

    @property
    def log_prob(self) -> float | None:
        """Mean log-probability of the preferred answer's tokens."""
        return sum(self.token_log_probs) / len(self.token_log_probs) if self.token_log_probs else None

    @property
    def says_old(self) -> bool | None:
        """Whether the old answer stands in what was generated; never where that is right (new "Paris, Texas")."""
        return None if self.old_target is None else not self.right and contains(self.answer, [self.old_target])

    @property
    def prefers_old(self) -> float | None:
        """1 where the old answer is more probable than the new one, token for token; 1/2 for a tie."""
        if self.old_log_prob is None or self.log_prob is None:
            return None
        return 0.5 * (1 + (self.old_log_prob > self.log_prob) - (self.old_log_prob < self.log_prob))


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


class _Tally:
    """Values by path in the report, each with its edit."""

    def __init__(self, edits: Sequence[str], seed: int) -> None:
        self.number = {edit: i for i, edit in enumerate(edits)}
        self.seed = seed
        self.values: dict[tuple[str, ...], list[tuple[int, float]]] = {}

    def add(self, path: tuple[str, ...], rows: Sequence[ProbeResult], measure: Callable[[ProbeResult], Any]) -> None:
        """``measure`` of every row; what is ``None`` could not be asked and does not count."""
        found = [(self.number[row.edit], measure(row)) for row in rows]
        self.values.setdefault(path, []).extend((edit, float(v)) for edit, v in found if v is not None)

    def into(self, tree: dict[str, Any]) -> None:
        """Put the scores in their places."""
        means = []
        for values in self.values.values():
            # Every process holds all results: a hidden collective would hang where only one of them evaluates.
            mean = EditMean(len(self.number), seed=self.seed, sync_on_compute=False)
            mean.update([edit for edit, _ in values], [value for _, value in values])
            means.append(mean)
        for path, score in zip(self.values, scores_of(means, self.seed), strict=True):
            branch = tree
            for name in path[:-1]:
                branch = branch.setdefault(name, {})
            branch[path[-1]] = score


def summarise(results: Sequence[ProbeResult], *, against_before: bool, seed: int = 0) -> dict[str, Any]:
    """The metrics of a report, as a tree of scores.

    Each of reliability, generality, portability and locality has

    - ``generated``: share of probes whose generated answer is right, except in locality with the unedited model's
      answers at hand: there the share whose answer is the same as before (equal after normalisation), right or wrong;
    - ``contains``: share whose answer has an accepted one in it;
    - ``teacher_forced``: mean over probes of the share of tokens that are first choice; ``teacher_forced_exact``: share
      of probes with all of them; ``target_loss`` and ``target_probability``: mean over probes of their tokens' mean;
    - ``ended``: share of answers that the model ended itself;
    - ``by_kind``: the same for each kind. Of generality, rephrasings alone make up the total: prefixes and format are
      asked on request, and a total must not depend on that.

    ``locality.right`` is the share whose answer is true, whatever it was before; ``locality.kept_right`` is, of the
    probes that the unedited model answered rightly, the share still right; ``locality.kl`` the mean over tokens of the
    KL to the unedited model. ``positions`` has accuracy, loss and probability of the edits' own targets by the token's
    place, from "1" on. ``resurgence`` says by kind how often the old answer is still said (``says_old``) or preferred
    (``prefers_old``). ``fluency`` is read from continuations of the edits' prompts.

    Args:
        results: of all questions.
        against_before: whether ``results`` hold the unedited model's answers.
        seed: of the bootstrap over edits (``cluster_bootstrap``).
    """
    tally = _Tally(list(dict.fromkeys(result.edit for result in results)), seed)
    metrics: dict[str, Any] = {}
    for question in QUESTIONS:
        own = [result for result in results if result.question == question]
        said = _unchanged if against_before and question == "locality" else _right
        metrics[question] = {}
        total = [r for r in own if question != "generality" or r.kind in HEADLINE]
        _add(tally, (question,), total, said)
        if question == "locality":
            metrics[question]["compared_with"] = "unedited model" if against_before else "truth"
            tally.add((question, "right"), own, _right)
            tally.add((question, "kept_right"), [r for r in own if r.right_before], _right)
            _add_kl(tally, (question, "kl"), own)
        if question != "reliability":
            metrics[question]["by_kind"] = {}
            for kind in sorted({result.kind for result in own}):
                _add(tally, (question, "by_kind", kind), [r for r in own if r.kind == kind], said)
                if question == "locality":
                    _add_kl(tally, (question, "by_kind", kind, "kl"), [r for r in own if r.kind == kind])
    _add_positions(tally, [r for r in results if r.question == "reliability"])
    _add_resurgence(tally, results)
    tally.add(("answers", "ended"), [r for r in results if r.question != "fluency"], lambda r: r.ended)
    written = [r for r in results if r.question == "fluency"]
    tally.add(("fluency", "entropy"), written, lambda r: ngram_entropy(r.answer))
    tally.add(("fluency", "repetition"), written, lambda r: repetition(r.answer))
    tally.add(("fluency", "ended"), written, lambda r: r.ended)
    tally.into(metrics)
    metrics["reliability"]["smallest_token_probability"] = _smallest(results)
    return metrics


def _right(result: ProbeResult) -> bool | None:
    return result.right


def _unchanged(result: ProbeResult) -> bool | None:
    return result.unchanged


def _add(tally: _Tally, path: tuple[str, ...], rows: Sequence[ProbeResult], said: Callable[[Any], Any]) -> None:
    tally.add((*path, "generated"), rows, said)
    for name, measure in _MEASURES.items():
        tally.add((*path, name), rows, measure)


def _add_kl(tally: _Tally, path: tuple[str, ...], rows: Sequence[ProbeResult]) -> None:
    tally.add(path, (), _right)
    for place in range(max((len(r.kl) for r in rows), default=0)):
        tally.add(path, [r for r in rows if len(r.kl) > place], lambda r, at=place: r.kl[at])


def _add_positions(tally: _Tally, rows: Sequence[ProbeResult]) -> None:
    for place in range(max((len(r.tokens_right) for r in rows), default=0)):
        own, path = [r for r in rows if len(r.tokens_right) > place], ("positions", str(place + 1))
        tally.add((*path, "accuracy"), own, lambda r, at=place: r.tokens_right[at])
        tally.add((*path, "loss"), own, lambda r, at=place: -r.token_log_probs[at])
        tally.add((*path, "probability"), own, lambda r, at=place: math.exp(r.token_log_probs[at]))


def _add_resurgence(tally: _Tally, results: Sequence[ProbeResult]) -> None:
    kinds = {
        "prompt": [r for r in results if r.question == "reliability"],
        "rephrase": [r for r in results if r.question == "generality" and r.kind == "rephrase"],
        "negation": [r for r in results if r.question == "resurgence" and r.kind == "negation"],
        "choice": [r for r in results if r.question == "resurgence" and r.kind == "choice"],
    }
    for kind, rows in kinds.items():
        if kind != "choice":
            tally.add(("resurgence", "says_old", kind), rows, lambda r: r.says_old)
        tally.add(("resurgence", "prefers_old", kind), rows, lambda r: r.prefers_old)


def _smallest(results: Sequence[ProbeResult]) -> Score:
    """The least probable target token of all edits; the mean hides the one token that did not take."""
    found = [p for r in results if r.question == "reliability" for p in r.token_log_probs]
    return Score(math.exp(min(found)), len(found)) if found else Score(None, 0)
