"""A report for the eye: scores side by side, then what the model says now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kedit_train.data.tokenization import shorten
from kedit_train.evaluation.reporting.report_lines import NOTE, figure, interval, notes, score_lines
from kedit_train.evaluation.scoring.metrics import ProbeResult

if TYPE_CHECKING:
    from kedit_train.evaluation.report import Report


def scores_table(report: Report) -> Table:
    """Questions down; unedited, edited, its interval, number of probes and teacher-forced accuracy across."""
    compared = report.unedited is not None
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        title_justify="left",
        title_style="bold",
    )
    edits, probes = report.meta["n_edits"], report.meta["n_probes"]
    every = report.meta.get("n_edits_in_data", edits)
    drawn = f"{edits} drawn of {every} edits" if edits < every else f"{edits} edit{'s' * (edits != 1)}"
    table.title = f"{drawn}, {probes} probes ({report.meta['data_name']})"
    table.add_column("", overflow="fold", min_width=15)
    if compared:
        table.add_column("unedited", justify="right", style="dim", no_wrap=True)
    table.add_column("edited" if compared else "generated", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", style="dim", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("teacher forced", justify="right", style="dim", min_width=7)
    for line in score_lines(report):
        cells = [Text(f"  {line.label}" if line.part else line.label, style="dim" if line.part else "")]
        cells += [Text(figure(line.unedited.value))] if compared else []
        style = "dim" if line.now.value is None else "" if line.part else "bold"
        cells += [Text(figure(line.now.value), style=style), Text(interval(line.now)), Text(str(line.now.n))]
        table.add_row(*cells, Text(figure(line.forced.value)))
    return table


def _answers(title: str, results: list[ProbeResult], compared: bool, wanted: bool) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        title=title,
        title_justify="left",
        title_style="bold",
    )
    table.add_column("", width=1, no_wrap=True)
    table.add_column("prompt", min_width=24, overflow="fold")
    if compared:
        table.add_column("before", style="dim", overflow="fold")
    table.add_column("after" if compared else "answer", overflow="fold")
    if wanted:
        table.add_column("wanted", style="dim", overflow="fold")
    for result in results:
        mark = {True: Text("✓", style="green"), False: Text("✗", style="red"), None: Text("·")}[result.right]
        said = shorten(result.answer, 32) + ("" if result.ended else " …") or "(nothing)"
        cells = [mark, Text(shorten(result.prompt, 70))]
        cells += [Text(shorten(result.before or "(nothing)", 32))] if compared else []
        cells += [Text(said, style="green" if result.right else "red" if result.right is False else "")]
        cells += [Text(shorten(result.accepted[0], 32))] if wanted else []
        table.add_row(*cells)
    return table


def drawn(report: Report, answers: int) -> Group:
    """The report as something that rich can print at any width from about 60 columns on."""
    parts: list[Any] = [scores_table(report), Text(), Text(NOTE, style="dim")]
    places = report.metrics.get("positions", {})
    if len(places) > 1:
        by_place = " ".join(f"{place['accuracy'].value:.2f}" for place in list(places.values())[:8])
        parts.append(Text(f"targets, first choice by token: {by_place}" + " …" * (len(places) > 8), style="dim"))
    compared = report.unedited is not None
    edits = [result for result in report.answers if result.question == "reliability"]
    changed = [result for result in report.answers if result.question == "locality" and result.unchanged is False]
    for title, results, wanted in (("The edits", edits, True), ("Changed elsewhere", changed, False)):
        if results and answers > 0:
            shown = min(answers, len(results))
            parts += [Text(), _answers(f"{title} ({shown} of {len(results)})", results[:answers], compared, wanted)]
    parts += [Text(note, style="yellow") for note in notes(report)]
    return Group(*parts)
