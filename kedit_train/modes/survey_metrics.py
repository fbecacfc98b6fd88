"""The survey's six metrics of knowledge editing, from runs in the modes that they are defined on.

"Knowledge Editing for Large Language Models: A Survey" (Wang et al., arXiv 2310.16218).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedit_train.errors import EditError
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.reporting.report_lines import figure, interval
from kedit_train.evaluation.scoring.bootstrap import EditMean, Score
from kedit_train.modes.result import ModeResult, written


@dataclass(frozen=True)
class SurveyMetrics:
    """Six scores under the survey's names; ``value`` is None where no run or no probe tells.

    Args:
        accuracy: share of the edits that are answered as wanted.
        locality: share of the questions elsewhere whose answer is the unedited model's.
        generality: share of the rephrasings answered as wanted.
        portability: share of the right answers where the answer follows from the edit.
        retainability: change of accuracy with every further edit of a sequence, 0 at best.
        scalability: accuracy of the edits one by one, less that of all at once, 0 at best.
        sources: metric -> the mode that it is of.
    """

    accuracy: Score
    locality: Score
    generality: Score
    portability: Score
    retainability: Score
    scalability: Score
    sources: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, numbers and strings."""
        return asdict(self)

    def markdown(self) -> str:
        """A table: value, interval, n, and the mode that each is of."""
        lines = ["| metric | value | 95 % | n | mode |", "|---|---:|---:|---:|---|"]
        for name, source in self.sources.items():
            score: Score = getattr(self, name)
            lines.append(f"| {name} | {_signed(score)} | {interval(score)} | {score.n} | {source} |")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON, or Markdown where ``path`` ends in ``.md``."""
        return written(path, self.markdown, self.to_dict)


def survey(*results: ModeResult) -> SurveyMetrics:
    """The six metrics out of one run or several, at most one of each mode, on the same edits.

    Accuracy, locality, generality and portability are those of the first one, after all its edits. Retainability needs
    ``sequential`` (or ``streaming``) with at least two checkpoints, scalability ``single`` and ``batch``.

    Raises:
        EditError: no results, two of one mode, or other edits or another model in one of them.
    """
    if not results:
        raise EditError("survey: no results: give what run_edits returned")
    by_mode = {result.mode: result for result in results}
    if len(by_mode) < len(results):
        raise EditError("survey: two results of one mode: give one of each")
    for name in ("data_hash", "model", "settings"):
        if any(result.meta[name] != results[0].meta[name] for result in results):
            raise EditError(f"survey: the results differ in {name}, so they do not compare: run the same again")
    first = results[0]
    own = first.report.metrics
    sequence = by_mode.get("sequential") or by_mode.get("streaming")
    kept, scaled = Score(None, 0), Score(None, 0)
    if sequence is not None and len(sequence.checkpoints) > 1:
        scores = {c.edits: c.report.metrics["reliability"]["generated"] for c in sequence.checkpoints}
        accuracy = {count: score.value for count, score in scores.items() if score.value is not None}
        kept = Score(retainability(accuracy), max(accuracy))
    if "single" in by_mode and "batch" in by_mode:
        scaled = scalability(by_mode["single"].report, by_mode["batch"].report, seed=first.meta["seed"])
    return SurveyMetrics(
        accuracy=own["reliability"]["generated"],
        locality=own["locality"]["generated"],
        generality=own["generality"]["generated"],
        portability=own["portability"]["generated"],
        retainability=kept,
        scalability=scaled,
        sources={
            **dict.fromkeys(("accuracy", "locality", "generality", "portability"), first.mode),
            "retainability": "–" if sequence is None else sequence.mode,
            "scalability": "single, batch" if scaled.n else "–",
        },
    )


def retainability(accuracy: Mapping[int, float]) -> float:
    """Ret = 1/(n - 1) sum over i of Acc(e_1..e_i+1) - Acc(e_1..e_i), from the accuracies at some numbers of edits.

    The sum telescopes: the first and the last accuracy tell it all, whatever happened between two checkpoints.

    Args:
        accuracy: edits so far -> accuracy on all of them, at two numbers of edits at least.

    Returns:
        The change of accuracy for each further edit; below 0 where earlier edits are lost.
    """
    first, last = min(accuracy), max(accuracy)
    if first == last:
        raise EditError("retainability: one checkpoint is no sequence: give accuracies after two numbers of edits")
    return (accuracy[last] - accuracy[first]) / (last - first)


def scalability(single: Report, batch: Report, seed: int = 0) -> Score:
    """Sca = E_e[Acc(M(f, e), e)] - Acc(M(f, E), E), its interval over edits, each compared with itself.

    Args:
        single: each edit on the unedited model; batch: all at once.
    """
    alone, together = (
        {r.edit: bool(r.right) for r in report.answers if r.question == "reliability"} for report in (single, batch)
    )
    if alone.keys() != together.keys():
        raise EditError("scalability: the two reports are on different edits: run both modes on the same")
    mean = EditMean(len(alone), seed=seed, sync_on_compute=False)
    mean.update(range(len(alone)), [float(right) - float(together[edit]) for edit, right in alone.items()])
    return mean.score()


def _signed(score: Score) -> str:
    return figure(score.value) if score.value is None or score.value >= 0 else f"-{figure(-score.value)}"
