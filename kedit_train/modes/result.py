"""The result of editing a model in one of the modes: one report per checkpoint, and the retention curve."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from kedit_train.atomic_write import writing
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.reporting.html_elements import fragment, page
from kedit_train.evaluation.reporting.html_report import render_html
from kedit_train.evaluation.reporting.markdown import markdown_table
from kedit_train.evaluation.reporting.report_lines import format_interval, format_number
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.capability import Capability
from kedit_train.evaluation.scoring.metrics import QUESTIONS
from kedit_train.modes.html_results import render_mode_result
from kedit_train.modes.retention_curve import draw_retention_curve
from kedit_train.modes.schedule import Mode
from kedit_train.plural import plural

# The lines below the table of a result.
NOTES = (
    "The scores are computed from generated answers on all edits so far, with 95 % intervals. See settings for the "
    "protocol.",
    "latest: reliability on the newest edits only. seconds: training time.",
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The scores of the model after a number of edits.

    Args:
        edits: number of edits so far.
        report: the report on all edits so far, with the unedited model's scores.
        latest: reliability on the newest edits. These are the edits that the last training run trained for the first
            time.
        capability: general ability of the model. None if not measured.
        seconds: training time so far, in seconds.
    """

    edits: int
    report: Report
    latest: Score
    capability: Capability | None
    seconds: float

    def scores(self) -> dict[str, Score]:
        """Return the scores of the retention curve by name. Scores that were not measured are left out."""
        scores = {"reliability": self.report.metrics["reliability"]["generated"], "latest": self.latest}
        scores |= {name: self.report.metrics[name]["generated"] for name in QUESTIONS[1:]}
        scores |= self.capability.scores() if self.capability is not None else {}
        return {name: score for name, score in scores.items() if score.n}


@dataclass(frozen=True, kw_only=True, repr=False)
class ModeResult:
    """The result of :func:`~kedit_train.modes.run_edits`.

    Args:
        mode: "single", "batch", "sequential" or "streaming".
        unedited: the unedited model's report on all edits.
        checkpoints: the checkpoints in order. The last checkpoint is after all edits. The modes "single" and "batch"
            have only this last checkpoint.
        capability: general ability of the unedited model. None if not measured.
        meta: mode, edits (number, name and hash), training function, seed, settings, versions and date.

    Example:
        >>> from kedit_train import EditDataset, run_edits, world
        >>> from kedit_train.modes import TrainLoop
        >>> model, tokenizer = world.load()
        >>> train = TrainLoop(tokenizer, epochs=2)
        >>> edits = EditDataset.load("world", limit=2)
        >>> result = run_edits(model, tokenizer, edits, mode="sequential", train=train, progress=False)
        >>> [row["edits"] for row in result.curve()]
        [1, 2]
        >>> result.report.meta["n_edits"]
        2
    """

    mode: Mode
    unedited: Report
    checkpoints: Sequence[Checkpoint]
    capability: Capability | None
    meta: dict[str, Any]

    @property
    def report(self) -> Report:
        """The report after all edits."""
        return self.checkpoints[-1].report

    def curve(self) -> list[dict[str, Any]]:
        """Return one row per checkpoint: ``edits``, ``seconds``, and every score by its name."""
        return [{"edits": c.edits, "seconds": c.seconds, **c.scores()} for c in self.checkpoints]

    def rows(self) -> list[list[str]]:
        """Return the rows of a table: the names of the columns, then one row per checkpoint.

        If ``capability`` was measured, the row of the unedited model comes before the checkpoints.
        """
        names = list(dict.fromkeys(name for c in self.checkpoints for name in c.scores()))
        rows = [["edits", *names, "seconds"]]
        if self.capability is not None:
            before = self.capability.scores()
            cells = [format_number(before[name].value) if name in before else "–" for name in names]
            rows.append(["0", *cells, "–"])
        for checkpoint in self.checkpoints:
            scores = checkpoint.scores()
            cells = [_cell(scores[name]) if name in scores else "–" for name in names]
            rows.append([str(checkpoint.edits), *cells, f"{checkpoint.seconds:.1f}"])
        return rows

    def markdown(self) -> str:
        """Return the curve as a Markdown table with 95 % intervals, followed by the metadata."""
        head, *rows = self.rows()
        lines = [f"# {self.title}", "", *markdown_table(head, rows, 0)]
        return "\n".join([*lines, "", *NOTES, "", *(f"- {name}: {value}" for name, value in self.meta.items())])

    def html(self) -> str:
        """Return a complete HTML page: the curve as a plot and a table, the metadata, and the report on all edits."""
        return page(self.title, render_mode_result(self, NOTES) + render_html(self.report, answers=100))

    def _repr_html_(self) -> str:
        return fragment(render_mode_result(self, NOTES))

    def __repr__(self) -> str:
        """Return one line: the mode, the number of checkpoints, and the scores after all edits."""
        count = len(self.checkpoints)
        return f"ModeResult({self.mode}, {plural(count, 'checkpoint')}, {self.report!r})"

    @property
    def title(self) -> str:
        """The heading of the table: the mode, the number of edits, and the name of the data set."""
        return f"{self.mode}: {self.meta['n_edits']} edits ({self.meta['data_name']})"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain dicts and lists. Only the last checkpoint includes the model's answers."""
        steps = []
        for checkpoint in self.checkpoints:
            report = checkpoint.report.to_dict()
            steps.append(
                {
                    "edits": checkpoint.edits,
                    "seconds": checkpoint.seconds,
                    "latest": asdict(checkpoint.latest),
                    "capability": _to_plain(checkpoint.capability),
                    "metrics": report["metrics"],
                    "unedited": report["unedited"],
                }
            )
        return {
            "meta": self.meta,
            "capability": _to_plain(self.capability),
            "checkpoints": steps,
            "report": self.report.to_dict(),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result atomically.

        Args:
            path: the file. The ending of its name sets the format: ``.png`` (a plot of the retention curve), ``.md``
                (Markdown) or ``.html`` (HTML). With any other ending, the format is JSON.

        Returns:
            The path.
        """
        if Path(path).suffix == ".png":
            return retention_curve({self.mode: self}, path)
        return write_text(path, self)


def retention_curve(results: Mapping[str, ModeResult], path: str | os.PathLike[str]) -> Path:
    """Plot reliability, generality, locality and agreement over the number of edits.

    Agreement is the fraction of unchanged answers to unrelated prompts. It is plotted if ``capability`` was measured.
    Bands show 95 % confidence intervals over edits. If a curve has a single checkpoint, a bar shows the interval.
    Hollow markers in the first panel show the reliability on the newest edits only.

    Args:
        results: dict from the label of a curve to the :class:`ModeResult` that the curve shows.
        path: a ``.png`` file.

    Returns:
        The path.

    Raises:
        EditError: there are no results with scores, or matplotlib is not installed.
    """
    curves = {label: {c.edits: c.scores() for c in result.checkpoints} for label, result in results.items()}
    return draw_retention_curve(curves, path)


class Writable(Protocol):
    """A result that can be written as Markdown, HTML and JSON."""

    def markdown(self) -> str: ...

    def html(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


def write_text(path: str | os.PathLike[str], result: Writable) -> Path:
    """Write a text file atomically: Markdown if ``path`` ends in ``.md``, HTML if in ``.html``, otherwise JSON."""
    path = Path(path)
    if path.suffix in (".md", ".html"):
        text = result.markdown() if path.suffix == ".md" else result.html()
    else:
        text = json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
    with writing(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
    return path


def _to_plain(capability: Capability | None) -> dict[str, Any] | None:
    return None if capability is None else {name: asdict(score) for name, score in capability.scores().items()}


def _cell(score: Score) -> str:
    return format_number(score.value) + (f" ({format_interval(score)})" if score.low is not None else "")
