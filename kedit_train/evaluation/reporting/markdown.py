"""A report as Markdown: for a model card, a pull request or a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kedit_train.data.tokenization import shorten
from kedit_train.evaluation.reporting.report_lines import NOTE, figure, interval, notes, score_lines

if TYPE_CHECKING:
    from kedit_train.evaluation.report import Report


def written(report: Report, answers: int) -> str:
    """The whole report; ``answers`` of the edits' answers at most, and as many changed answers elsewhere."""
    return "\n".join([*_scores(report), *_positions(report), *_answers(report, answers), *_repeating(report)])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> Iterator[str]:
    """A table whose columns from ``right`` on hold numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if i < right else "---:" for i in range(len(head))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def cell(text: str, width: int = 60) -> str:
    """``text`` as it reads, in one cell: nothing in it is taken for Markdown."""
    short = shorten(text, width)
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|" else char for char in short)


def _scores(report: Report) -> Iterator[str]:
    meta = report.meta
    yield f"# Evaluation: {cell(str(meta['model']), 80)}"
    yield ""
    edits = f"{meta['n_edits']} of {meta['n_edits_in_data']} edits"
    yield f"{edits} ({cell(meta['data_name'])}), {meta['n_probes']} probes."
    yield ""
    compared = report.unedited is not None
    head = [
        "",
        *(["unedited"] if compared else []),
        "edited" if compared else "generated",
        "95 %",
        "n",
        "teacher-forced",
    ]
    rows = []
    for line in score_lines(report):
        label = f"&nbsp;&nbsp;{cell(line.label)}" if line.part else cell(line.label)
        numbers = [figure(line.unedited.value)] if compared else []
        numbers += [figure(line.now.value), interval(line.now), str(line.now.n), figure(line.forced.value)]
        rows.append([label, *numbers])
    yield from _table(head, rows, 1)
    yield ""
    yield f"{NOTE}."
    for note in notes(report):
        yield f"\n{note}."


def _positions(report: Report) -> Iterator[str]:
    places = report.metrics.get("positions", {})
    if not places:
        return
    yield "\n## The edits' targets, token by token\n"
    rows = [
        [
            place,
            figure(s["accuracy"].value),
            figure(s["loss"].value),
            figure(s["probability"].value),
            str(s["accuracy"].n),
        ]
        for place, s in places.items()
    ]
    yield from _table(["token", "first choice", "loss", "probability", "n"], rows, 0)


def _answers(report: Report, count: int) -> Iterator[str]:
    edits = [result for result in report.answers if result.question == "reliability"]
    changed = [result for result in report.answers if result.question == "locality" and result.unchanged is False]
    for title, results in (("The edits", edits), ("Changed elsewhere", changed)):
        if not results or count < 1:
            continue
        yield f"\n## {title} ({min(count, len(results))} of {len(results)})\n"
        rows = []
        for one in results[:count]:
            mark = {True: "yes", False: "no", None: "–"}[one.right]
            wanted = cell(one.accepted[0], 40) if one.accepted else "–"
            before = "–" if one.before is None else cell(one.before, 40) or "(nothing)"
            said = (cell(one.answer, 40) or "(nothing)") + ("" if one.ended else " …")
            rows.append([cell(one.prompt, 70), before, said, wanted, mark])
        yield from _table(["prompt", "before", "after", "wanted", "right"], rows, 5)


def _repeating(report: Report) -> Iterator[str]:
    meta = report.meta
    yield "\n## To repeat it\n"
    for name, value in (
        ("data", f"{meta['data_name']}, SHA-256 `{meta['data_hash']}`"),
        ("seed", meta["seed"]),
        ("settings", ", ".join(f"{key}={value}" for key, value in meta["settings"].items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in meta["versions"].items())),
        ("date", meta["date"]),
        ("seconds", meta["seconds"]),
    ):
        yield f"- {name}: {value}"
