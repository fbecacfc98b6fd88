"""The data of a report: scores, answers and metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.divergence import Distribution
from kedit_train.evaluation.scoring.probe_results import ProbeResult
from kedit_train.evaluation.scoring.protocols import EXACT, Protocols

# Scores of a metric that get their own series in a logger. All other scores are only in the report.
_LOGGED_SCORES = (
    *("teacher_forced", "leading", "exact", "wild", "probability", "magnitude"),
    *("right", "kept_right", "tokens_kept", "kl", "smallest_token_probability"),
)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The data fields of :class:`~kedit_train.evaluation.Report`. That class documents each field."""

    metrics: Mapping[str, Any]
    unedited: Mapping[str, Any] | None
    answers: Sequence[ProbeResult]
    meta: Mapping[str, Any]
    distributions: Mapping[str, Distribution] = field(default_factory=dict, compare=False, repr=False)

    @property
    def protocols(self) -> Protocols:
        """The protocols of the evaluation. The first one gives the headline scores."""
        names = self.meta.get("settings", {}).get("protocol", str(EXACT))
        return replace(Protocols.parse(names), reason=self.meta.get("protocol_reason", ""))

    def answers_table(self) -> list[dict[str, Any]]:
        """Return one row per edit, with the keys prompt, target, old_target, before, after and right."""
        return [
            {
                "prompt": result.prompt,
                "target": result.accepted[0],
                "old_target": result.old_target,
                "before": result.before,
                "after": result.answer,
                "right": result.right,
            }
            for result in self.answers
            if result.question == "reliability"
        ]

    def flat(self, prefix: str = "edit/") -> dict[str, float]:
        """Return the scores as a flat dict for experiment loggers, from name to number.

        Scores without probes are left out. ``edit/reliability`` is the headline score, which the report calls
        "generated". Other examples of names: ``edit/reliability_teacher_forced``, ``edit/locality/<kind>``,
        ``edit/locality_kept_right``, ``edit/resurgence/prefers_old/<kind>``, ``edit/fluency/entropy``,
        ``edit/perplexity``.
        """
        return {prefix + name: score.value for name, score in flatten(self.metrics) if score.value is not None}


def flatten(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    """Yield pairs (name for experiment loggers, score) from the nested dict of metrics.

    The entry "positions" is left out. It contains the scores of the first, second, ... token of the targets.
    """
    for question, scores in metrics.items():
        if question == "positions":
            continue
        if isinstance(scores, Score):
            yield question, scores
        elif "generated" in scores:
            yield from _question_scores(question, scores)
            for kind, own in scores.get("by_kind", {}).items():
                yield from _question_scores(f"{question}/{kind}", own)
        else:
            for name, own in scores.items():
                yield from flatten({f"{question}/{name}": own})


def _question_scores(name: str, scores: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    yield name, scores["generated"]
    yield from ((f"{name}_{logged}", scores[logged]) for logged in _LOGGED_SCORES if logged in scores)
