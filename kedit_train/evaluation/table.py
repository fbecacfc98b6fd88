"""A report for the eye: scores side by side, then what the model says now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kedit_train.evaluation.batching import shorten
from kedit_train.evaluation.metrics import QUESTIONS, ProbeResult, Score

if TYPE_CHECKING:
    from kedit_train.evaluation.report import Report

_NONE = Score(None, 0)


def _number(score: Score, style: str = "") -> Text:
    return Text("–", style="dim") if score.value is None else Text(f"{score.value:.3f}", style=style)


def _lines(metrics: Mapping[str, Any], unedited: Mapping[str, Any]) -> Iterator[tuple[str, Score, Score, Score]]:
    """``(label, unedited, edited, teacher-forced)`` of each line; several kinds are indented below theirs."""
    for question in QUESTIONS:
        now, then = metrics[question], unedited.get(question, {})
        compared = now.get("compared_with") == "unedited model"
        # Before the edit nothing had changed: the share of unchanged answers has no "unedited" figure.
        label = "locality: same answers" if compared else "locality: right" if question == "locality" else question
        was = _NONE if compared else then.get("generated", _NONE)
        yield label, was, now["generated"], _NONE if compared else now["teacher_forced"]
        kinds = now.get("by_kind", {})
        for kind, own in kinds.items() if len(kinds) > 1 else ():
            was = _NONE if compared else then.get("by_kind", {}).get(kind, {}).get("generated", _NONE)
            yield f"  {kind}", was, own["generated"], _NONE if compared else own["teacher_forced"]
        if compared:
            # Teacher forcing asks for the true answer, so its figure stands beside the share that is right.
            yield "locality: right", then.get("right", _NONE), now["right"], now["teacher_forced"]
            yield "locality: right ones kept", _NONE, now["kept_right"], _NONE


def scores_table(report: Report) -> Table:
    """Questions down; unedited, edited, number of probes and teacher-forced accuracy across."""
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
    table.title = f"{edits} edit{'s' * (edits != 1)}, {probes} probes ({report.meta['data_name']})"
    table.add_column("", overflow="fold", min_width=18)
    if compared:
        table.add_column("unedited", justify="right", style="dim", no_wrap=True)
    table.add_column("edited" if compared else "generated", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("teacher-forced", justify="right", style="dim", no_wrap=True)
    for label, then, now, forced in _lines(report.metrics, report.unedited or {}):
        main = not label.startswith("  ")
        cells = [Text(label, style="" if main else "dim")]
        cells += [_number(then)] if compared else []
        cells += [_number(now, "bold" if main else ""), Text(str(now.n)), _number(forced)]
        table.add_row(*cells)
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
    parts: list[Any] = [scores_table(report), Text()]
    parts.append(
        Text(
            "generated: greedy, to the model's own end, exact match after normalisation; "
            "teacher-forced: share of answer tokens ranked first",
            style="dim",
        )
    )
    compared = report.unedited is not None
    edits = [result for result in report.answers if result.question == "reliability"]
    changed = [result for result in report.answers if result.question == "locality" and result.unchanged is False]
    for title, results, wanted in (("The edits", edits, True), ("Changed elsewhere", changed, False)):
        if results and answers > 0:
            shown = min(answers, len(results))
            parts += [Text(), _answers(f"{title} ({shown} of {len(results)})", results[:answers], compared, wanted)]
    for question, n in report.meta.get("unscored", {}).items():
        parts.append(Text(f"{question}: no accepted answer for {n} of the probes, not scored", style="yellow"))
    return Group(*parts)
