"""``Report``: the result of an evaluation, with ways to print, save and load it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError
from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.reporting.html_elements import fragment, page
from kedit_train.evaluation.reporting.html_report import render_html
from kedit_train.evaluation.reporting.markdown import render_markdown
from kedit_train.evaluation.reporting.report_lines import HEADING, format_number
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.metrics import QUESTIONS
from kedit_train.evaluation.scoring.probe_results import ProbeResult
from kedit_train.safetensors_header import parse_json

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_IN_FILES = 120


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(ReportData):
    """The result of :func:`~kedit_train.evaluation.evaluate`.

    Args:
        metrics: nested dict. For example, ``metrics["reliability"]["generated"]`` is a
            :class:`~kedit_train.evaluation.Score`. "reliability", "generality", "portability" and "locality" each have
            "generated", "teacher_forced" and more scores, which
            :func:`~kedit_train.evaluation.scoring.metrics.summarize` explains. "perplexity" is a single score.
            "weight_drift" is a dict of three scores, or empty if not measured. "router" is a dict with the score "kl".
            Only reports of ``EditMetrics`` on mixture-of-experts models contain "router".
        unedited: the metrics of the unedited model, or None. In these metrics, locality is the fraction of right
            answers.
        answers: one :class:`~kedit_train.evaluation.scoring.probe_results.ProbeResult` per evaluation prompt.
        meta: dict with the metadata of the evaluation. It contains the number, the name and the hash of the edits, the
            model, versions, settings, seed, date, and duration in seconds.
        distributions: dict from prompt or text to the unedited model's next-token distributions. Only the report on the
            unedited model contains them, and only if the metric "kl" or ``prose`` was requested. The distributions are
            kept in memory and not saved.

    Example:
        >>> from kedit_train import EditDataset, Report, evaluate, world
        >>> model, tokenizer = world.load()
        >>> report = evaluate(model, tokenizer, EditDataset.load("world", limit=2))
        >>> report.metrics["reliability"]["generated"]  # the model does not know the new answers yet
        Score(value=0.0, n=2, low=0.0, high=0.0)
        >>> report.flat()["edit/locality"]
        1.0
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = report.save(f"{folder}/report.json")
        ...     Report.load(path) == report
        True
    """

    def markdown(self, answers: int = 10) -> str:
        """Return the report as Markdown.

        Args:
            answers: maximum number of rows in each of three tables. They show the edits, the rephrased prompts to which
                the model does not give the new answer, and the locality prompts whose answer the edit changed.
        """
        return render_markdown(self, answers)

    def html(self, answers: int = 100, *, delta: Any = None) -> str:
        """Return the report as a complete HTML page, without scripts and without links to other files.

        The page contains the scores with their intervals, the answers before and after the edit with the differences
        marked, and the change of the weights per layer. If a report is the last expression of a notebook cell, the
        notebook shows the same content.

        Args:
            answers: maximum number of rows in each of three tables. They show the edits, the rephrased prompts to which
                the model does not give the new answer, and the locality prompts whose answer the edit changed.
            delta: the :class:`~kedit_train.delta.EditDelta` of the edit. The page then shows the weight changes in this
                delta. Without a delta, the page shows the weight changes that the evaluation measured. They are
                measured only if the evaluation was given the weights before the edit.
        """
        norms = None if delta is None else delta.norms()
        return page(f"{HEADING} {self.meta['data_name']}", render_html(self, answers, norms))

    def _repr_html_(self) -> str:
        return fragment(render_html(self, answers=12))

    def __repr__(self) -> str:
        """Return one line: the number of edits, and the headline scores."""
        scores = {name: self.metrics[name]["generated"].value for name in QUESTIONS if name in self.metrics}
        shown = [f"{name} {format_number(value)}" for name, value in scores.items() if value is not None]
        count = f"{self.meta.get('n_edits', 0)} edits"
        return f"Report({', '.join([count, *shown])})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, numbers and strings, in the structure of the JSON file."""
        return {
            "metrics": _to_plain(self.metrics),
            "unedited": _to_plain(self.unedited),
            "meta": _to_plain(self.meta),
            "answers": _to_plain(self.answers),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a file atomically, and create missing parent folders.

        Args:
            path: the file. Its format is Markdown if the name ends in ``.md``, HTML if the name ends in ``.html``, and
                JSON otherwise.

        Returns:
            The path.
        """
        path = Path(path)
        if path.suffix == ".md":
            text = self.markdown()
        elif path.suffix == ".html":
            text = self.html()
        else:
            text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        with writing(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a JSON file that :meth:`save` wrote.

        Raises:
            EditError: the file is not an evaluation report.
        """
        try:
            data = parse_json(Path(path).read_text(encoding="utf-8"))
            known = {field.name for field in fields(ProbeResult)}
            answers = [
                ProbeResult(**{key: _as_tuple(value) for key, value in row.items() if key in known})
                for row in data["answers"]
            ]
            return cls(
                metrics=_restore_scores(data["metrics"]),
                unedited=_restore_scores(data["unedited"]),
                answers=answers,
                meta=data["meta"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EditError(
                f"{path} is not an evaluation report in JSON ({type(error).__name__}: {error}); give a JSON file that "
                "Report.save wrote, or evaluate the model again and save the report.",
                component="Report",
            ) from error

    def print(self, console: Console | None = None, *, answers: int = 12) -> None:
        """Print the scores and some answers as tables. The tables are colored in a terminal and plain in a log.

        In a notebook, the tables are displayed as HTML.

        Args:
            console: where to print. Default: standard output.
            answers: maximum number of rows in each of three tables. They show the edits, the rephrased prompts to which
                the model does not give the new answer, and the locality prompts whose answer the edit changed.
        """
        # Imported here, because training without printing must not need rich.
        from rich.console import Console

        from kedit_train.evaluation.reporting.terminal_table import render_report

        if console is not None:
            console.print(render_report(self, answers))
            return
        # A progress bar may occupy the current line. tqdm.write prints above a tqdm bar. It also prints above a rich
        # progress bar, because it uses sys.stdout, which rich replaces. A new console would bypass this replacement.
        own = Console()
        if not own.is_terminal and not own.is_jupyter and "COLUMNS" not in os.environ:
            # A file or a pipe has no width, and rich would cut the answers at 80 columns.
            own = Console(width=_WIDTH_IN_FILES)
        if own.is_jupyter:
            from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

            display(HTML(fragment(render_html(self, answers))))
            return
        with own.capture() as captured:
            own.print(render_report(self, answers))
        tqdm.write(captured.get(), end="")


def _to_plain(value: Any) -> Any:
    if isinstance(value, Score | ProbeResult):
        return {field.name: _to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(inner) for inner in value]
    return value


def _restore_scores(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {field.name for field in fields(Score)}:
            return Score(**value)
        return {key: _restore_scores(inner) for key, inner in value.items()}
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
