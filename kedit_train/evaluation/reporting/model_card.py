"""A model card section on an edit: the edited facts, the scores, the cost, and the papers behind the method."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError
from kedit_train.evaluation.report_data import ReportData
from kedit_train.evaluation.reporting.markdown import escape_cell, markdown_table
from kedit_train.evaluation.reporting.report_lines import (
    HEADING,
    format_interval,
    format_number,
    notes,
    protocol_note,
    score_lines,
)
from kedit_train.evaluation.scoring.metrics import QUESTIONS

BEGIN, END = "<!-- kedit-train: begin -->", "<!-- kedit-train: end -->"
EXAMPLES = 5
OVERTONE = ("Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", "2502.00602")
# Beginning of a callback's repr -> the papers that the callback's docstring names as its source.
PAPERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "ParameterScope": (("Fine-tuning Done Right in Model Editing", "2509.22072"),),
    'TokenLoss("overtone"': (OVERTONE,),
    "TokenSmoothing": (OVERTONE,),
    "ContextTeacher": (("In-Context Editing: Learning Knowledge from Self-Induced Distributions", "2406.11194"),),
    'TokenLoss("dft"': (("On the Generalization of SFT", "2508.05629"),),
    "KLLocality": (("Fast Model Editing at Scale", "2110.11309"),),
    "OutputAnchor": (("Dark Experience for General Continual Learning", "2004.07211"),),
    "ForgettingBudget": (("Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", "2007.03964"),),
    "NormBall": (("Modifying Memories in Transformer Models", "2012.00363"),),
    "NullSpace": (("AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", "2410.02355"),),
    "LowCurvature": (("CrispEdit", "2602.15823"),),
    "PolyakStep": (("MoMo: Momentum Models for Adaptive Learning Rates", "2305.07583"),),
    "SecondOrderLocality": (
        ("Optimizing Neural Networks with Kronecker-factored Approximate Curvature", "1503.05671"),
    ),
    "WeightAnchor": (
        ("Explicit Inductive Bias for Transfer Learning with Convolutional Networks", "1802.01483"),
        ("Overcoming catastrophic forgetting in neural networks", "1612.00796"),
    ),
}
# The paper that explains why an edit should be judged by generated answers.
EVALUATION_PAPER = ("The Mirage of Model Editing: Revisiting Evaluation in the Wild", "2502.11177")


def model_card_section(
    report: ReportData, *, delta: Any = None, cost: Mapping[str, Any] | None = None, base: str | None = None
) -> str:
    """Return a section about the edit for a model card. It is Markdown and starts with ``## Knowledge edit``.

    Args:
        report: the report on the edited model, with the unedited model's scores if they are known.
        delta: the :class:`~kedit_train.delta.EditDelta`. If given, the section describes which weights changed.
        cost: additional costs that you measured, such as ``{"training": "38 s on one GPU"}``.
        base: public name of the model before the edit, such as its hub name. Default: the name in ``delta``.
    """
    delta_meta = delta.meta if delta is not None else {}
    configuration = delta_meta.get("configuration") or {}
    callbacks = report.meta.get("callbacks") or configuration.get("callbacks") or []
    parts = [
        _edit_lines(report, delta, base or (delta_meta.get("base") or {}).get("name"), callbacks),
        _score_lines(report),
        _cost_lines(report, delta, cost or {}),
        _paper_lines(callbacks),
    ]
    return "\n".join(line for part in parts for line in (*part, "")).rstrip() + "\n"


def insert_section(path: str | os.PathLike[str], section: str) -> Path:
    """Write the section about the edit into a model card.

    Two HTML comments mark the beginning and the end of the section. If the card already contains a marked section,
    ``section`` replaces it. Otherwise, ``section`` is appended to the card. If there is no card, the file is created.
    All text outside the marked section stays unchanged, byte for byte.

    Args:
        path: the model card.
        section: what :func:`model_card_section` returns.

    Returns:
        The path.

    Raises:
        EditError: one of the two HTML comments is missing, repeated or in the wrong place.
    """
    path = Path(path)
    # The file is read as bytes, because text mode would change the line endings of another operating system.
    card = path.read_bytes() if path.is_file() else b""
    marked = f"{BEGIN}\n{section.rstrip()}\n{END}".encode()
    begin, end = BEGIN.encode(), END.encode()
    if (card.count(begin), card.count(end)) not in ((0, 0), (1, 1)) or card.find(end) < card.find(begin):
        raise EditError(
            f"{path} must contain the comments {BEGIN!r} and {END!r} once each, in this order, or neither of them; "
            "correct the comments, or remove all of them."
        )
    if begin in card:
        updated = card[: card.index(begin)] + marked + card[card.index(end) + len(end) :]
    else:
        gap = (b"" if not card or card.endswith(b"\n") else b"\n") + (b"\n" if card else b"")
        updated = card + gap + marked + b"\n"
    with writing(path) as unfinished:
        unfinished.write_bytes(updated)
    return path


def questions_without_probes(report: ReportData) -> list[str]:
    """Return the metrics, such as "portability", that have no score because the data has no probes for them."""
    unscored = report.meta.get("unscored", {})
    return [q for q in QUESTIONS if not report.metrics[q]["generated"].n and q not in unscored]


def _edit_lines(report: ReportData, delta: Any, base: str | None, callbacks: list[str]) -> Iterator[str]:
    meta = report.meta
    yield "## Knowledge edit\n"
    yield "### What was edited?\n"
    sample = "" if meta["n_edits"] == meta["n_edits_in_data"] else f" (evaluated on a sample of {meta['n_edits']})"
    yield f"- edits: {meta['n_edits_in_data']}{sample}, from {escape_cell(meta['data_name'])}"
    yield f"- SHA-256 of the edits: `{meta['data_hash']}`"
    if base:
        yield f"- base model: {escape_cell(base, 100)}"
    if delta is not None:
        yield f"- fingerprint of the base model's weights: `{delta.meta['base']['fingerprint']}`"
        names = ", ".join(f"`{name}`" for name in list(delta.changes)[:3])
        more = f" and {len(delta) - 3} more" if len(delta) > 3 else ""
        yield f"- changed weights: {names}{more}; all other weights equal the base model's weights bit for bit"
    yield from (f"- callback: {escape_cell(callback, 200)}" for callback in callbacks)
    results = [r for r in report.answers if r.question == "reliability"]
    if results:
        yield f"\nThe first {min(EXAMPLES, len(results))} of {len(results)} edits:\n"
        yield from markdown_table(["prompt", "before", "after", "target"], [_example(r) for r in results[:EXAMPLES]], 4)


def _example(result: Any) -> list[str]:
    before = "–" if result.before is None else escape_cell(result.before, 40) or "(empty)"
    target = escape_cell(result.accepted[0], 40) if result.accepted else "–"
    return [escape_cell(result.prompt, 70), before, escape_cell(result.answer, 40) or "(empty)", target]


def _score_lines(report: ReportData) -> Iterator[str]:
    compared = report.unedited is not None
    yield f"### {HEADING}\n"
    rows = []
    for line in score_lines(report):
        label = f"&nbsp;&nbsp;{escape_cell(line.label)}" if line.is_kind else escape_cell(line.label)
        edited = format_number(line.edited.value) if line.edited.n or line.unedited.n else "no probes"
        before = [format_number(line.unedited.value)] if compared else []
        rows.append([label, *before, edited, format_interval(line.basis), str(line.basis.n)])
    yield from markdown_table(["", *(["unedited"] if compared else []), "edited", "95 % CI", "n"], rows, 1)
    yield f"\n{protocol_note(report)}."
    yield "95 % CI: bootstrap over edits. n: number of probes."
    for note in notes(report):
        yield f"\n{note}."


def _cost_lines(report: ReportData, delta: Any, cost: Mapping[str, Any]) -> Iterator[str]:
    yield "### What did it cost?\n"
    yield from (f"- {escape_cell(str(name))}: {escape_cell(str(value), 200)}" for name, value in cost.items())
    configuration = (delta.meta.get("configuration") or {}) if delta is not None else {}
    steps = report.meta.get("steps", configuration.get("steps"))
    if steps is not None:
        yield f"- optimizer steps: {steps}"
    if delta is not None:
        yield f"- changed weights: {len(delta)} tensors, {delta.nbytes / 1e6:.2f} MB as a delta"
    yield f"- evaluation: {report.meta['seconds']:.1f} s for {report.meta['n_probes']} probes"
    versions = ", ".join(f"{name} {version}" for name, version in report.meta["versions"].items())
    yield f"- seed {report.meta['seed']}; {escape_cell(versions, 200)}; {report.meta['date']}"


def _paper_lines(callbacks: list[str]) -> Iterator[str]:
    cited = [
        paper for text in callbacks for start, papers in PAPERS.items() if text.startswith(start) for paper in papers
    ]
    papers = dict.fromkeys([*cited, EVALUATION_PAPER])
    yield "### Papers\n"
    yield from (f"- {title} ([arXiv {number}](https://arxiv.org/abs/{number}))" for title, number in papers)
