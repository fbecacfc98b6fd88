"""Render a report for the terminal: the table of scores, then some answers."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kedit_train.data.tokenization import shorten
from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.reporting.report_lines import (
    HEADING,
    answer_lists,
    continuation,
    format_interval,
    format_number,
    notes,
    score_lines,
    table_note,
)
from kedit_train.evaluation.scoring.probe_results import ProbeResult
from kedit_train.plural import plural


def render_report(report: ReportData, answers: int) -> Group:
    """Return the report as a rich renderable for terminals that are at least about 60 columns wide.

    Args:
        report: the report.
        answers: maximum number of rows in each of three tables. They show the edits, the rephrased prompts to which the
            model does not give the new answer, and the locality prompts whose answer the edit changed.
    """
    parts: list[Any] = [_scores_table(report), Text(), Text(table_note(report), style="dim")]
    positions = report.metrics.get("positions", {})
    if len(positions) > 1:
        shares = " ".join(f"{scores['accuracy'].value:.2f}" for scores in list(positions.values())[:8])
        more = " …" if len(positions) > 8 else ""
        parts.append(Text(f"fraction of target tokens ranked first, by position: {shares}{more}", style="dim"))
    compared = report.unedited is not None
    for title, results in answer_lists(report) if answers > 0 else ():
        heading = f"{title} ({min(answers, len(results))} of {len(results)})"
        with_target = results[0].question != "locality"
        parts += [Text(), _answers_table(heading, results[:answers], compared, with_target)]
        if len(results) > answers:
            where = "in Report.answers, and in the JSON file that Report.save or report_path writes"
            parts.append(Text(f"{len(results) - answers} more answers are {where}", style="dim"))
    parts += [Text(note, style="yellow") for note in notes(report)]
    return Group(*parts)


def _new_table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        title=title,
        title_justify="left",
        title_style="bold",
    )


def _scores_table(report: ReportData) -> Table:
    """Return a table with one row per score: unedited, edited, interval, number of probes, teacher-forced."""
    compared = report.unedited is not None
    edits, probes = report.meta["n_edits"], report.meta["n_probes"]
    total = report.meta.get("n_edits_in_data", edits)
    sample = f"a sample of {edits} of {total} edits" if edits < total else plural(edits, "edit")
    table = _new_table(f"{HEADING} {sample}, {probes} probes ({report.meta['data_name']})")
    table.add_column("", overflow="fold", min_width=15)
    if compared:
        table.add_column("unedited", justify="right", style="dim", no_wrap=True)
    table.add_column("edited" if compared else "generated", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", style="dim", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("teacher forced", justify="right", style="dim", min_width=7)
    for line in score_lines(report):
        cells = [Text(f"  {line.label}" if line.is_kind else line.label, style="dim" if line.is_kind else "")]
        cells += [Text(format_number(line.unedited.value))] if compared else []
        style = "dim" if line.edited.value is None else "" if line.is_kind else "bold"
        cells += [Text(format_number(line.edited.value), style=style), Text(format_interval(line.basis))]
        table.add_row(*cells, Text(f"{line.basis.n:,}"), Text(format_number(line.teacher_forced.value)))
    return table


def _answers_table(title: str, results: list[ProbeResult], compared: bool, with_target: bool) -> Table:
    table = _new_table(title)
    table.add_column("", width=1, no_wrap=True)
    table.add_column("prompt", min_width=24, overflow="fold")
    if compared:
        table.add_column("before", style="dim", overflow="fold")
    table.add_column("after" if compared else "answer", overflow="fold")
    if with_target:
        table.add_column("target", style="dim", overflow="fold")
    for result in results:
        mark = {True: Text("✓", style="green"), False: Text("✗", style="red"), None: Text("·")}[result.right]
        answer = f"{shorten(result.answer, 32) or '(empty)'} {continuation(result)}".rstrip()
        cells = [mark, Text(shorten(result.prompt, 70))]
        cells += [Text(shorten(result.before or "(empty)", 32))] if compared else []
        cells += [Text(answer, style="green" if result.right else "red" if result.right is False else "")]
        cells += [Text(shorten(result.accepted[0], 32))] if with_target else []
        table.add_row(*cells)
    return table
