"""Render a report as Markdown, for a pull request or a web page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kedit_train.data.tokenization import shorten
from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.reporting.report_lines import (
    HEADING,
    answer_lists,
    continuation,
    format_interval,
    format_number,
    notes,
    reproduction,
    score_lines,
    table_note,
)


def render_markdown(report: ReportData, answers: int) -> str:
    """Return the report as Markdown.

    Args:
        report: the report.
        answers: maximum number of rows in each of three tables. They show the edits, the rephrased prompts to which the
            model does not give the new answer, and the locality prompts whose answer the edit changed.
    """
    parts = (_scores(report), _positions(report), _answers(report, answers), _reproduction(report))
    return "\n".join(line for part in parts for line in part)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> Iterator[str]:
    """Yield the lines of a Markdown table: ``text_columns`` columns of text, then right-aligned numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if i < text_columns else "---:" for i in range(len(head))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def escape_cell(text: str, width: int = 60) -> str:
    """Shorten a text to ``width`` characters and escape every character that Markdown would interpret."""
    short = shorten(text, width)
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|" else char for char in short)


def _scores(report: ReportData) -> Iterator[str]:
    meta = report.meta
    yield f"# Evaluation of {escape_cell(str(meta['model']), 80)}"
    yield ""
    edits = f"{meta['n_edits']} of {meta['n_edits_in_data']} edits"
    yield f"{edits} ({escape_cell(meta['data_name'])}), {meta['n_probes']} probes."
    yield f"\n## {HEADING}\n"
    compared = report.unedited is not None
    head = ["", *(["unedited"] if compared else []), "edited" if compared else "generated"]
    head += ["95 % CI", "n", "teacher-forced"]
    rows = []
    for line in score_lines(report):
        label = f"&nbsp;&nbsp;{escape_cell(line.label)}" if line.is_kind else escape_cell(line.label)
        numbers = [format_number(line.unedited.value)] if compared else []
        numbers += [format_number(line.edited.value), format_interval(line.basis), str(line.basis.n)]
        rows.append([label, *numbers, format_number(line.teacher_forced.value)])
    yield from markdown_table(head, rows, 1)
    yield ""
    yield f"{table_note(report)}."
    for note in notes(report):
        yield f"\n{note}."


def _positions(report: ReportData) -> Iterator[str]:
    positions = report.metrics.get("positions", {})
    if not positions:
        return
    yield "\n## Targets of the edits, token by token\n"
    rows = [
        [
            position,
            *(format_number(scores[name].value) for name in ("accuracy", "loss", "probability")),
            str(scores["accuracy"].n),
        ]
        for position, scores in positions.items()
    ]
    yield from markdown_table(["token", "ranked first", "loss", "probability", "n"], rows, 0)


def _answers(report: ReportData, limit: int) -> Iterator[str]:
    for title, results in answer_lists(report) if limit > 0 else ():
        yield f"\n## {title} ({min(limit, len(results))} of {len(results)})\n"
        rows = []
        for result in results[:limit]:
            right = {True: "yes", False: "no", None: "–"}[result.right]
            target = escape_cell(result.accepted[0], 40) if result.accepted else "–"
            before = "–" if result.before is None else escape_cell(result.before, 40) or "(empty)"
            after = f"{escape_cell(result.answer, 40) or '(empty)'} {continuation(result)}".rstrip()
            rows.append([escape_cell(result.prompt, 70), before, after, target, right])
        yield from markdown_table(["prompt", "before", "after", "target", "right"], rows, 5)


def _reproduction(report: ReportData) -> Iterator[str]:
    yield "\n## How to reproduce it\n"
    values = dict(reproduction(report))
    values["data"] += f", SHA-256 `{values.pop('SHA-256 of the data')}`"
    yield from (f"- {name}: {value}" for name, value in values.items())
