"""What came of edits in one of the modes: a report for each checkpoint, and the curve through them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.reporting.report_lines import figure, interval
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.capability import Capability
from kedit_train.modes.schedule import Mode

QUESTIONS = ("reliability", "generality", "portability", "locality")


@dataclass(frozen=True)
class Checkpoint:
    """The model after so many edits.

    Args:
        edits: how many it has had.
        report: of all of them, with the unedited model beside it.
        latest: reliability of those of the last round alone.
        capability: what it can do beside them, where that was asked for.
        seconds: of training, up to here.
    """

    edits: int
    report: Report
    latest: Score
    capability: Capability | None
    seconds: float

    def scores(self) -> dict[str, Score]:
        """What the curve shows of it, by name; what was not measured is left out."""
        found = {"reliability": self.report.metrics["reliability"]["generated"], "latest": self.latest}
        found |= {name: self.report.metrics[name]["generated"] for name in QUESTIONS[1:]}
        found |= self.capability.scores() if self.capability is not None else {}
        return {name: score for name, score in found.items() if score.n}


@dataclass(frozen=True)
class ModeResult:
    """The outcome of :func:`~kedit_train.modes.run_edits`.

    Args:
        mode: ``single``, ``batch``, ``sequential`` or ``streaming``.
        before: the unedited model's report on all the edits.
        checkpoints: in order; the last one is after all the edits. ``single`` and ``batch`` have no other.
        capability: the unedited model's, where asked for.
        meta: mode, edits (number, name, hash), training, seed, settings, versions, date.
    """

    mode: Mode
    before: Report
    checkpoints: Sequence[Checkpoint]
    capability: Capability | None
    meta: dict[str, Any]

    @property
    def report(self) -> Report:
        """After all the edits."""
        return self.checkpoints[-1].report

    def curve(self) -> list[dict[str, Any]]:
        """A row a checkpoint: ``edits``, ``seconds``, and every score by its name."""
        return [{"edits": c.edits, "seconds": c.seconds, **c.scores()} for c in self.checkpoints]

    def markdown(self) -> str:
        """The curve as a table, with 95 % intervals, and what repeats it."""
        names = list(dict.fromkeys(name for c in self.checkpoints for name in c.scores()))
        lines = [f"# {self.mode}: {self.meta['n_edits']} edits ({self.meta['data_name']})", ""]
        lines += ["| edits | " + " | ".join(names) + " | seconds |", "|" + "---:|" * (len(names) + 2)]
        if self.capability is not None:
            was = self.capability.scores()
            lines.append("| 0 | " + " | ".join(figure(was[n].value) if n in was else "–" for n in names) + " | – |")
        for checkpoint in self.checkpoints:
            own = checkpoint.scores()
            cells = [_cell(own[name]) if name in own else "–" for name in names]
            lines.append(f"| {checkpoint.edits} | " + " | ".join(cells) + f" | {checkpoint.seconds:.1f} |")
        lines += ["", "Generated answers, exact match, of all edits so far; latest: of the last round alone.", ""]
        return "\n".join([*lines, *(f"- {name}: {value}" for name, value in self.meta.items())])

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; answers of the last checkpoint only."""
        steps = []
        for c in self.checkpoints:
            own = c.report.to_dict()
            steps.append(
                {
                    "edits": c.edits,
                    "seconds": c.seconds,
                    "latest": asdict(c.latest),
                    "capability": _plain(c.capability),
                    "metrics": own["metrics"],
                    "unedited": own["unedited"],
                }
            )
        return {
            "meta": self.meta,
            "capability": _plain(self.capability),
            "checkpoints": steps,
            "report": self.report.to_dict(),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON, Markdown (``.md``) or the retention curve (``.png``), whole or not at all."""
        if Path(path).suffix == ".png":
            from kedit_train.modes.retention_curve import retention_curve

            return retention_curve({self.mode: self}, path)
        return written(path, self.markdown, self.to_dict)


def written(path: str | os.PathLike[str], markdown: Any, to_dict: Any) -> Path:
    """Write a text file, Markdown where ``path`` ends in ``.md`` and JSON else, whole or not at all."""
    path = Path(path)
    text = markdown() if path.suffix == ".md" else json.dumps(to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
    with writing(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
    return path


def _plain(capability: Capability | None) -> dict[str, Any] | None:
    return None if capability is None else {name: asdict(score) for name, score in capability.scores().items()}


def _cell(score: Score) -> str:
    return figure(score.value) + (f" ({interval(score)})" if score.low is not None else "")
