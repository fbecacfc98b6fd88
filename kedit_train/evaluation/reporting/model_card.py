"""A section for a model card: what was edited, whether it took, what it cost, and whose ideas it rests on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.reporting.markdown import cell
from kedit_train.evaluation.reporting.report_lines import figure, interval, notes, score_lines
from kedit_train.evaluation.scoring.metrics import QUESTIONS

BEGIN, END = "<!-- kedit-train: begin -->", "<!-- kedit-train: end -->"
# Callback -> the papers that its docstring names as the source of what it does by default.
PAPERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "ParameterScope": (("Fine-tuning Done Right in Model Editing", "2509.22072"),),
    'TokenLoss("overtone"': (("Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", "2502.00602"),),
    'TokenLoss("dft"': (("On the Generalization of SFT", "2508.05629"),),
    "TokenSmoothing": (("Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", "2502.00602"),),
    "KLLocality": (("Fast Model Editing at Scale", "2110.11309"),),
    "NormBall": (("Modifying Memories in Transformer Models", "2012.00363"),),
    "NullSpace": (("AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", "2410.02355"),),
    "LowCurvature": (("CrispEdit", "2602.15823"),),
    "WeightAnchor": (
        ("Explicit Inductive Bias for Transfer Learning with Convolutional Networks", "1802.01483"),
        ("Overcoming catastrophic forgetting in neural networks", "1612.00796"),
    ),
}
# Why success is what the model generates.
MIRAGE = ("The Mirage of Model Editing: Revisiting Evaluation in the Wild", "2502.11177")


def section(
    report: Report, *, delta: Any = None, cost: Mapping[str, Any] | None = None, base: str | None = None
) -> str:
    """The section as Markdown, from ``## Knowledge edit`` on.

    Args:
        report: of the edited model; with the unedited model's scores where it was evaluated ``before``.
        delta: the :class:`~kedit_train.delta.EditDelta`, for what changed in the weights.
        cost: what the edit took, by name, as it was measured ("training": "38 s on one GPU"); stands beside what the
            report knows itself.
        base: the model before the edit, as a reader can find it.
    """
    meta = delta.meta if delta is not None else {}
    callbacks = report.meta.get("callbacks") or (meta.get("configuration") or {}).get("callbacks") or []
    parts = [
        _edited(report, delta, base or (meta.get("base") or {}).get("name"), callbacks),
        _scores(report),
        _cost(report, delta, cost or {}),
        _papers(callbacks),
    ]
    return "\n".join(line for part in parts for line in (*part, "")).rstrip() + "\n"


def put(path: str | os.PathLike[str], text: str) -> Path:
    """Write a section into a model card: in place of the one there, else at the end, else as a new file.

    All else in the card stays, byte for byte. The section lies between two comments, by which it is found again.

    Raises:
        EditError: one of the two comments is missing in the card.
    """
    path = Path(path)
    # Bytes: reading as text would change another system's line ends.
    card = path.read_bytes() if path.is_file() else b""
    framed = f"{BEGIN}\n{text.rstrip()}\n{END}".encode()
    begin, end = BEGIN.encode(), END.encode()
    if (card.count(begin), card.count(end)) not in ((0, 0), (1, 1)) or card.find(end) < card.find(begin):
        raise EditError(f"{path} should hold {BEGIN!r} and {END!r} once each, in this order: mend it, or remove both")
    if begin in card:
        made = card[: card.index(begin)] + framed + card[card.index(end) + len(end) :]
    else:
        made = card + (b"" if not card or card.endswith(b"\n") else b"\n") + (b"\n" if card else b"") + framed + b"\n"
    with writing(path) as unfinished:
        unfinished.write_bytes(made)
    return path


def without_probes(report: Report) -> list[str]:
    """The questions that the edits bring no probes for: they have no score."""
    unscored = report.meta.get("unscored", {})
    return [q for q in QUESTIONS if not report.metrics[q]["generated"].n and q not in unscored]


def _edited(report: Report, delta: Any, base: str | None, callbacks: list[str]) -> Iterator[str]:
    meta = report.meta
    yield "## Knowledge edit\n"
    yield "### What was edited\n"
    of = "" if meta["n_edits"] == meta["n_edits_in_data"] else f" (scored: a sample of {meta['n_edits']})"
    yield f"- facts: {meta['n_edits_in_data']}{of}, from {cell(meta['data_name'])}, SHA-256 `{meta['data_hash']}`"
    if base:
        yield f"- base model: {cell(base, 100)}"
    if delta is not None:
        yield f"- base weights: fingerprint `{delta.meta['base']['fingerprint']}`"
        names = ", ".join(f"`{name}`" for name in list(delta.changes)[:3])
        more = f" and {len(delta) - 3} more" if len(delta) > 3 else ""
        yield f"- weights changed: {names}{more}; all others are the base's, bit for bit"
    yield from (f"- with: {cell(callback, 200)}" for callback in callbacks)
    rows = [r for r in report.answers if r.question == "reliability"]
    if rows:
        yield f"\nThe first {min(5, len(rows))} of {len(rows)}:\n"
        yield "| prompt | before | now | wanted |"
        yield "|---|---|---|---|"
        for one in rows[:5]:
            before = "–" if one.before is None else cell(one.before, 40) or "(nothing)"
            wanted = cell(one.accepted[0], 40) if one.accepted else "–"
            yield f"| {cell(one.prompt, 70)} | {before} | {cell(one.answer, 40) or '(nothing)'} | {wanted} |"


def _scores(report: Report) -> Iterator[str]:
    compared = report.unedited is not None
    yield "### Did it take, and what else changed?\n"
    yield "| | unedited | edited | 95 % | n |" if compared else "| | edited | 95 % | n |"
    yield "|---|---:|---:|---:|---:|" if compared else "|---|---:|---:|---:|"
    for line in score_lines(report):
        now = figure(line.now.value) if line.now.n else "no probes"
        label = f"&nbsp;&nbsp;{cell(line.label)}" if line.part else cell(line.label)
        before = f" {figure(line.unedited.value)} |" if compared else ""
        yield f"| {label} |{before} {now} | {interval(line.now)} | {line.now.n} |"
    yield "\nAnswers are generated greedily, to the model's own end, and compared exactly after normalisation."
    yield "95 %: bootstrap over edits; n: probes."
    for note in notes(report):
        yield f"\n{note}."


def _cost(report: Report, delta: Any, cost: Mapping[str, Any]) -> Iterator[str]:
    yield "### What it cost\n"
    yield from (f"- {cell(str(name))}: {cell(str(value), 200)}" for name, value in cost.items())
    configuration = (delta.meta.get("configuration") or {}) if delta is not None else {}
    steps = report.meta.get("steps", configuration.get("steps"))
    if steps is not None:
        yield f"- optimizer steps: {steps}"
    if delta is not None:
        yield f"- weights changed: {len(delta)} tensors, {delta.nbytes / 1e6:.2f} MB as a delta"
    yield f"- evaluation: {report.meta['seconds']:.1f} s for {report.meta['n_probes']} probes"
    versions = ", ".join(f"{name} {version}" for name, version in report.meta["versions"].items())
    yield f"- seed {report.meta['seed']}; {cell(versions, 200)}; {report.meta['date']}"


def _papers(callbacks: list[str]) -> Iterator[str]:
    used = [paper for one in callbacks for name, papers in PAPERS.items() if one.startswith(name) for paper in papers]
    papers = dict.fromkeys([*used, MIRAGE])
    yield "### Papers\n"
    yield from (f"- {title} ([arXiv {number}](https://arxiv.org/abs/{number}))" for title, number in papers)
