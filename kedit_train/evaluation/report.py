"""What an evaluation found: scores, answers, and all that is needed to repeat it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.divergence import Distribution
from kedit_train.evaluation.scoring.metrics import ProbeResult

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`~kedit_train.evaluation.evaluate`.

    Args:
        metrics: question -> ``generated``, ``teacher_forced``, ... ; the leaves are :class:`Score`. See
            :func:`~kedit_train.evaluation.scoring.metrics.summarise` for what each means; ``perplexity`` of the
            given texts and ``weight_drift`` from the given weights.
        unedited: the same of the unedited model, where its report was given; its locality is compared with the truth.
        answers: every probe with what the model said, and what it said before.
        meta: edits (number, name, hash), model, versions, settings, seed, date, seconds.
        distributions: prompt -> what this model expects there, where ``kl`` was asked for of an unedited model; lives
            in memory only.
    """

    metrics: Mapping[str, Any]
    unedited: Mapping[str, Any] | None
    answers: Sequence[ProbeResult]
    meta: Mapping[str, Any]
    distributions: Mapping[str, Distribution] = field(default_factory=dict, compare=False, repr=False)

    def answers_table(self) -> list[dict[str, Any]]:
        """One row per edit, for a table: prompt, target, old_target, before, after, right."""
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
        """The scores as loggers want them: one name, one number. Scores without probes are left out.

        ``edit/reliability`` is what was generated, ``edit/reliability_teacher_forced`` stands beside it,
        ``edit/locality/<kind>`` is one kind, ``edit/locality_kept_right`` of the right answers the share that is left,
        ``edit/resurgence/prefers_old/<kind>``, ``edit/fluency/entropy``, ``edit/perplexity`` what their names say.
        """
        return {prefix + name: score.value for name, score in flatten(self.metrics) if score.value is not None}

    def markdown(self, answers: int = 10) -> str:
        """The report as Markdown: scores with intervals, target positions, answers, and what repeats it."""
        from kedit_train.evaluation.reporting.markdown import written

        return written(self, answers)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; ``["metrics"]["reliability"]["generated"]["value"]`` is a number."""
        return {
            "metrics": _plain(self.metrics),
            "unedited": _plain(self.unedited),
            "meta": _plain(self.meta),
            "answers": _plain(self.answers),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON, or Markdown where ``path`` ends in ``.md``, whole or not at all; parent folders are made."""
        path = Path(path)
        if path.suffix == ".md":
            text = self.markdown()
        else:
            text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        with writing(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what :meth:`save` wrote.

        Raises:
            EditError: the file is not such a report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            known = {field.name for field in fields(ProbeResult)}
            answers = [ProbeResult(**{k: _tupled(v) for k, v in row.items() if k in known}) for row in data["answers"]]
            return cls(_scored(data["metrics"]), _scored(data["unedited"]), answers, data["meta"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise EditError(
                f"{path} is not an evaluation report ({type(error).__name__}: {error}): evaluate again"
            ) from error

    def print(self, console: Console | None = None, *, answers: int = 5) -> None:
        """The scores and some answers as a table, coloured in a terminal and plain in a log.

        Args:
            console: where to; standard output by default.
            answers: how many edits' answers to show; as many changed answers elsewhere follow at most.
        """
        from rich.console import Console

        from kedit_train.evaluation.reporting.terminal_table import drawn

        if console is not None:
            console.print(drawn(self, answers))
            return
        # A progress bar may have the current line. Through tqdm's own way of writing it makes room; rich's stands in
        # for standard output, which a console of one's own would go past.
        own = Console()
        with own.capture() as captured:
            own.print(drawn(self, answers))
        tqdm.write(captured.get(), end="")


def flatten(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    """The scores of a tree, each under its name in a logger; what has a score for each position is no series."""
    for question, scores in metrics.items():
        if question == "positions":
            continue
        if isinstance(scores, Score):
            yield question, scores
        elif "generated" in scores:
            yield from _of_question(question, scores)
            for kind, own in scores.get("by_kind", {}).items():
                yield from _of_question(f"{question}/{kind}", own)
        else:
            for name, own in scores.items():
                yield from flatten({f"{question}/{name}": own})


# Of a question, what is worth a series of its own; the rest is in the report.
_SERIES = ("teacher_forced", "right", "kept_right", "kl", "smallest_token_probability")


def _of_question(name: str, scores: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    yield name, scores["generated"]
    yield from ((f"{name}_{series}", scores[series]) for series in _SERIES if series in scores)


def _plain(value: Any) -> Any:
    if isinstance(value, Score | ProbeResult):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _scored(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {field.name for field in fields(Score)}:
            return Score(**value)
        return {key: _scored(inner) for key, inner in value.items()}
    return value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
