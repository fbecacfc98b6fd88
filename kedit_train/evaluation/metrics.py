"""From answers to scores. Every score carries the number of probes behind it; no probes is no score, not 0 or 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

QUESTIONS = ("reliability", "generality", "portability", "locality")


@dataclass(frozen=True)
class Score:
    """A mean over ``n`` probes; ``value`` is ``None`` where ``n`` is 0."""

    value: float | None
    n: int


@dataclass(frozen=True)
class ProbeResult:
    """One question that was put to the model, and what came back.

    Args:
        edit: the id of the edit that it belongs to (its number in the data where it has none).
        question: ``reliability``, ``generality``, ``portability`` or ``locality``.
        kind: the probe's kind (``prompt``, ``rephrase``, or the data's own).
        prompt: what the model read.
        accepted: every answer that counts as right, the preferred one first; may be empty.
        answer: what it generated.
        ended: whether it ended the answer itself.
        right: whether the answer is one of ``accepted``; ``None`` where there are none.
        before: the unedited model's answer; ``None`` where it was not given.
        right_before: whether that was right.
        unchanged: whether the two are the same after normalisation, right or wrong.
        token_accuracy: share of the preferred answer's tokens that are first choice under teacher forcing.
        tokens_right: the same, per token.
        old_target: what was true before (edits' own prompts only).
    """

    edit: str
    question: str
    kind: str
    prompt: str
    accepted: tuple[str, ...]
    answer: str
    ended: bool
    right: bool | None = None
    before: str | None = None
    right_before: bool | None = None
    unchanged: bool | None = None
    token_accuracy: float | None = None
    tokens_right: tuple[bool, ...] = ()
    old_target: str | None = None


class Share(Metric):
    """Mean of the values it was given, with their number; its states are sums, so several processes add up exactly."""

    full_state_update = False
    total: Tensor
    n: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Iterable[float]) -> None:
        """Add values; an empty list is fine (a process without probes must still take part)."""
        given = torch.tensor([float(value) for value in values], dtype=torch.float64)
        self.total += given.sum().to(self.total)
        self.n += given.numel()

    def compute(self) -> tuple[Tensor, Tensor]:
        """``(total, n)``; :meth:`score` turns them into a :class:`Score`."""
        return self.total, self.n

    def score(self) -> Score:
        total, n = self.compute()
        return Score(float(total / n) if int(n) else None, int(n))


def score(values: Iterable[bool | float | None]) -> Score:
    """The mean of ``values``; those that are ``None`` could not be asked and do not count."""
    # Every process evaluates what it was given: a hidden collective would hang where only one of them evaluates.
    share = Share(sync_on_compute=False)
    share.update(float(value) for value in values if value is not None)
    return share.score()


def _scores(results: Sequence[ProbeResult], against_before: bool) -> dict[str, Any]:
    said = (result.unchanged if against_before else result.right for result in results)
    return {
        "generated": score(said),
        "teacher_forced": score(result.token_accuracy for result in results),
        "teacher_forced_exact": score(all(r.tokens_right) if r.tokens_right else None for r in results),
    }


def summarise(results: Sequence[ProbeResult], *, against_before: bool) -> dict[str, Any]:
    """The metrics of a report: per question ``generated``, ``teacher_forced``, ``teacher_forced_exact`` as scores.

    ``generated`` is the share of probes whose generated answer is right, except in locality with the unedited
    model's answers at hand: there it is the share whose answer is the same as before (METHODS: exact equality after
    normalisation), right or wrong. ``teacher_forced`` is the mean over probes of the share of tokens that are first
    choice; ``teacher_forced_exact`` the share of probes with all of them. Portability and locality come ``by_kind``
    too. ``locality.right`` is the share whose answer is true, whatever it was before; ``locality.kept_right`` is, of
    the probes that the unedited model answered rightly, the share still right.

    Args:
        results: of all questions.
        against_before: whether ``results`` hold the unedited model's answers.
    """
    metrics: dict[str, Any] = {}
    for question in QUESTIONS:
        own = [result for result in results if result.question == question]
        same = against_before and question == "locality"
        metrics[question] = _scores(own, same)
        if question in ("portability", "locality"):
            kinds = sorted({result.kind for result in own})
            metrics[question]["by_kind"] = {k: _scores([r for r in own if r.kind == k], same) for k in kinds}
        if question == "locality":
            metrics[question]["compared_with"] = "unedited model" if against_before else "truth"
            metrics[question]["right"] = score(r.right for r in own)
            metrics[question]["kept_right"] = score(r.right for r in own if r.right_before)
    return metrics
