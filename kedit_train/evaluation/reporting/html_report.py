"""Render a report as HTML: scores with intervals, answers with the differences marked, and the drift of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.reporting.html_elements import Cell, escape, figure, figures, paragraph, table
from kedit_train.evaluation.reporting.layer_drift import drift_by_layer
from kedit_train.evaluation.reporting.report_lines import (
    HEADING,
    ScoreLine,
    answer_lists,
    continuation,
    format_interval,
    format_number,
    notes,
    reproduction,
    score_lines,
    table_note,
)
from kedit_train.evaluation.reporting.svg_plots import interval_bar, layer_bars
from kedit_train.evaluation.reporting.word_diff import mark_changes
from kedit_train.evaluation.scoring.probe_results import ProbeResult
from kedit_train.evaluation.scoring.weight_drift import BY_TENSOR
from kedit_train.plural import plural

# Longer texts are cut, so that one endless answer does not fill the page.
LONGEST = 600
_MARKS = {True: Cell(text="✓", style="yes"), False: Cell(text="✗", style="no"), None: Cell(text="·", style="dim")}


def render_html(report: ReportData, answers: int, norms: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Return the report as HTML, without the ``<html>`` element and the style sheet of a page.

    Args:
        report: the report.
        answers: maximum number of rows in each of three tables. They show the edits, the rephrased prompts to which the
            model does not give the new answer, and the locality prompts whose answer the edit changed.
        norms: the norms of the weight change per tensor, as ``EditDelta.norms`` returns them. Default: the norms that
            the evaluation measured, if it was given the weights before the edit.
    """
    by_tensor = report.meta.get(BY_TENSOR, {}) if norms is None else norms
    parts = [*_scores(report), *_positions(report), *_answers(report, answers), *drift_section(by_tensor)]
    return "\n".join([*parts, *_reproduction(report)])


def drift_section(norms: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the section with the change of the weights per layer. Nothing is yielded if ``norms`` is empty."""
    layers = drift_by_layer(norms)
    if not layers:
        return
    yield "<h2>How far did the weights move?</h2>"
    relative = all(layer.relative is not None for layer in layers)
    measure = (
        "norm of the change divided by the norm of the changed tensors before the edit"
        if relative
        else "norm of the change"
    )
    tensors = plural(len(norms), "changed tensor")
    yield figure(layer_bars(layers), f"Per layer: {measure}. {tensors}; all others are unchanged.")


def _scores(report: ReportData) -> Iterator[str]:
    meta, lines = report.meta, list(score_lines(report))
    edits, total = meta["n_edits"], meta.get("n_edits_in_data", meta["n_edits"])
    sample = f"a sample of {edits} of {total} edits" if edits < total else plural(edits, "edit")
    yield f"<h1>{HEADING}</h1>"
    yield paragraph(f"{sample} ({meta['data_name']}), {meta['n_probes']} probes. Model: {meta['model']}.", "dim")
    shown = [line for line in lines if line.is_headline and line.edited.value is not None]
    yield figures([(line.label, format_number(line.edited.value), _below(line)) for line in shown])
    compared = report.unedited is not None
    head = [Cell(style="label"), *([Cell(text="unedited", style="number")] if compared else [])]
    head += [Cell(text="edited" if compared else "generated", style="number"), Cell(text="95 % CI", style="number")]
    head += [Cell(text="n", style="number"), Cell(text="teacher-forced", style="number")]
    styles = ["part" if line.is_kind else "strong" if line.is_headline else "" for line in lines]
    yield table(head, (_score_cells(line, compared) for line in lines), styles=styles)
    rings = " The ring is the score of the unedited model." if compared else ""
    bars = "Each bar goes from 0 to 1. Its dot is the score, and its line is the interval."
    yield paragraph(f"{table_note(report)}. {bars}{rings}", "dim")
    yield from (paragraph(f"{note}.", "warning") for note in notes(report))


def _below(line: ScoreLine) -> str:
    interval = f"95 %: {format_interval(line.edited)}, " if line.edited.low is not None else ""
    before = f"; unedited: {format_number(line.unedited.value)}" if line.unedited.value is not None else ""
    # A line break after "n =" would separate the number from its name.
    return f"{interval}n\u00a0=\u00a0{line.edited.n:,}{before}"


def _score_cells(line: ScoreLine, compared: bool) -> list[Cell]:
    bar = interval_bar(line.edited, line.unedited) if line.is_fraction and line.basis.value is not None else ""
    before = [Cell(text=format_number(line.unedited.value))] if compared else []
    return [
        Cell(text=line.label),
        *before,
        Cell(text=format_number(line.edited.value)),
        Cell(text=format_interval(line.basis), html=bar),
        Cell(text=f"{line.basis.n:,}"),
        Cell(text=format_number(line.teacher_forced.value)),
    ]


def _positions(report: ReportData) -> Iterator[str]:
    positions = report.metrics.get("positions", {})
    if len(positions) < 2:
        return
    yield "<h2>Targets of the edits, token by token</h2>"
    names = ("accuracy", "loss", "probability")
    head = [Cell(text=text, style="number") for text in ("token", "ranked first", "loss", "probability", "n")]
    rows = (
        [
            Cell(text=str(position)),
            *(Cell(text=format_number(scores[name].value)) for name in names),
            Cell(text=str(scores["accuracy"].n)),
        ]
        for position, scores in positions.items()
    )
    yield table(head, rows)


def _answers(report: ReportData, limit: int) -> Iterator[str]:
    compared = report.unedited is not None
    for title, results in answer_lists(report) if limit > 0 else ():
        yield f"<h2>{escape(title)} ({min(limit, len(results))} of {len(results)})</h2>"
        with_target = results[0].question != "locality"
        names = ["prompt", *(["before", "after"] if compared else ["answer"]), *(["target"] if with_target else [])]
        head = [Cell(), *(Cell(text=name) for name in names)]
        rows = (list(_answer_cells(result, compared, with_target)) for result in results[:limit])
        yield table(head, rows, cards=True)
        if len(results) > limit:
            yield paragraph(
                f"{len(results) - limit} more answers are in Report.answers and in the JSON file of the report.", "dim"
            )


def _answer_cells(result: ProbeResult, compared: bool, with_target: bool) -> Iterator[Cell]:
    before, after = mark_changes(_cut(result.before or ""), _cut(result.answer))
    empty = '<span class="dim">(empty)</span>'
    more = f' <span class="dim">{mark}</span>' if (mark := continuation(result)) else ""
    yield _MARKS[result.right]
    yield Cell(html=_isolated(escape(_cut(result.prompt))))
    if compared:
        yield Cell(html=_isolated(before) if before else empty)
    shown = after if compared else escape(_cut(result.answer.strip()))
    # One element, because on a narrow screen the elements of a cell are placed one below the other.
    yield Cell(html=f"<span>{_isolated(shown) if shown else empty}{more}</span>")
    if with_target:
        yield Cell(html=_isolated(escape(_cut(result.accepted[0]))) if result.accepted else "–", style="dim")


def _isolated(html: str) -> str:
    """Put ``html`` into an element, so that right-to-left text in it does not change the text around it."""
    return f"<bdi>{html}</bdi>"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _reproduction(report: ReportData) -> Iterator[str]:
    yield "<h2>How to reproduce it</h2>"
    values = [*reproduction(report)]
    values += [("callback", str(callback)) for callback in report.meta.get("callbacks", ())]
    if "steps" in report.meta:
        values.append(("optimizer steps", str(report.meta["steps"])))
    yield table(
        [Cell(), Cell()], ([Cell(text=name, style="dim"), Cell(text=value, style="text")] for name, value in values)
    )
