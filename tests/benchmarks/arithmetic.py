"""Arithmetic with edits, in tables and figures: sums, negation, and scaling.

    python tests/benchmarks/arithmetic.py                                   # the bundled world
    python tests/benchmarks/arithmetic.py --model factlm --lr 3e-3          # CounterFact facts

The facts are in two disjoint halves. (a) The sum of the deltas of the halves, and their TIES and DARE merges, against
one training on both, at growing coefficients. (b) The delta of an edit with coefficients from 1 to -1; and how much
of a delta that was trained on the old answers must be subtracted until they are gone (the first step of F-Learning),
as a length and as the coefficient of the paper. (c) A sweep that chooses a coefficient on held-out edits. The output
is three PNG files and a section of RESULTS.md. One matrix is trained; scores are generated answers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from paired import arguments, record, table

from kedit_train import EditDataset, EditDelta, evaluate, world
from kedit_train.callbacks import ForgetFirst, ForgetTraining, ParameterScope, editing
from kedit_train.cli.kedit.sweep_plot import sweep_plot
from kedit_train.data import Edit
from kedit_train.delta import merge, sweep
from kedit_train.evaluation import EvaluationOptions
from kedit_train.evaluation.reporting.plots import new_figure, save_figure
from kedit_train.modes import TrainLoop

ROOT = Path(__file__).resolve().parents[2]
FACTLM = ROOT.parent / "shared" / "models" / "factlm"
QUESTIONS = ("reliability", "generality", "locality")
# The colors of Okabe and Ito, each with its own marker, so that the curves differ without color.
COLOURS, MARKERS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"), ("o", "s", "^", "D", "v")
Point = Mapping[str, float]


class Bench:
    """A model, its edits, their training and their evaluation."""

    def __init__(self, options: Any) -> None:
        if options.model == "factlm":
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.model = AutoModelForCausalLM.from_pretrained(FACTLM).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(FACTLM)
            # Every sentence in the training of this model ends with a full stop; edits without it would change that.
            records = EditDataset.load(FACTLM / "records.json")[: 2 * options.edits]
            edits = [replace(e, target=f"{e.target}.", old_target=f"{e.old_target}.") for e in records]
            self.texts = [f"{e.prompt} {e.old_target}." for e in EditDataset.load(FACTLM / "records.json")[-64:]]
        else:
            self.model, self.tokenizer = world.load()
            edits = world.edits(2 * options.edits, seed=options.seed)
            self.texts = world.locality_texts(exclude=edits, n=64, seed=options.seed)
        n = options.edits
        self.first, self.second = edits[:n], edits[n:]
        self.lr, self.epochs = options.lr, options.epochs
        self.asked: dict[str, Any] = {"options": EvaluationOptions(max_new_tokens=12), "progress": False}
        self.asked["seed"] = options.seed
        self.before = evaluate(self.model, self.tokenizer, edits, **self.asked)
        self.n = {q: self.before.metrics[q]["generated"].n for q in QUESTIONS}

    def loop(self, **given: Any) -> TrainLoop:
        scope = [ParameterScope(0.7, modules="mlp.down_proj")]
        settings: dict[str, Any] = {"epochs": self.epochs, "batch_size": 16, "learning_rate": self.lr}
        return TrainLoop(self.tokenizer, callbacks=scope, **settings | given)

    def delta(self, edits: Sequence[Edit]) -> EditDelta:
        own = copy.deepcopy(self.model)
        torch.manual_seed(0)
        self.loop()(own, edits)
        return EditDelta.between(self.model, own, edits=edits)

    def scores(self, edits: Sequence[Edit], model: Any = None) -> dict[str, float]:
        names = {edit.id for edit in edits}
        part = replace(self.before, answers=[a for a in self.before.answers if a.edit in names])
        report = evaluate(self.model if model is None else model, self.tokenizer, edits, unedited=part, **self.asked)
        return {q: report.metrics[q]["generated"].value for q in QUESTIONS}

    def with_(self, vector: Any, coefficient: float, score: Callable[[], Any]) -> Any:
        if coefficient == 0:
            return score()
        applied = (coefficient * vector).apply(self.model)
        try:
            return score()
        finally:
            applied.revert(self.model)


def sums(bench: Bench, grid: Sequence[float]) -> tuple[dict[str, dict[float, Point]], float]:
    """Return the scores on both halves by combination and coefficient, and the cosine of the two deltas."""
    both = [*bench.first, *bench.second]
    one, other, joint = bench.delta(bench.first), bench.delta(bench.second), bench.delta(both)
    made = {
        "sum of two deltas": one + other,
        "trained together": joint.vector(),
        "TIES, density 0.5": merge([one, other], method="ties"),
    }
    found = {
        label: {c: bench.with_(vector, c, lambda: bench.scores(both)) for c in grid} for label, vector in made.items()
    }
    return found, one.vector().cosine(other)


def negation(bench: Bench, grid: Sequence[float]) -> dict[float, Point]:
    """Return new answers, old answers and locality of a delta by coefficient."""
    edits, delta = bench.first, bench.delta(bench.first)
    olden = [replace(e, target=str(e.old_target), aliases=(), rephrases=(), portability={}, locality={}) for e in edits]

    def measure() -> dict[str, float]:
        own = bench.scores(edits)
        old = evaluate(bench.model, bench.tokenizer, olden, **bench.asked).metrics["reliability"]["generated"].value
        return {"new answers": own["reliability"], "old answers": old, "locality": own["locality"]}

    return {c: bench.with_(delta.vector(), c, measure) for c in grid}


def forgetting(bench: Bench, grid: Sequence[float]) -> dict[str, ForgetFirst]:
    """Subtract the old answers after a short and after a long training on them, at every coefficient."""
    results = {}
    for epochs in (1, bench.epochs):
        model = copy.deepcopy(bench.model)
        forget = ForgetFirst(
            bench.texts,
            edits=bench.first,
            coefficients=list(grid),
            # Limits that are never reached, so that every coefficient is measured.
            max_probability=1e-9,
            max_perplexity_ratio=1e9,
            training=ForgetTraining(epochs=epochs, learning_rate=bench.lr, batch_size=16),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="ForgetFirst: with coefficient")
            scope = ParameterScope(0.7, modules="mlp.down_proj")
            with editing(model, [scope, forget], tokenizer=bench.tokenizer) as edit:
                edit.before_step()
        results[f"{epochs} epoch{'s' if epochs > 1 else ''}"] = forget
    return results


def panel(axes: Any, curves: Mapping[str, Mapping[float, float]], title: str, below: str) -> None:
    for (label, points), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        axes.plot(list(points), list(points.values()), marker=marker, color=colour, label=label, markersize=5,
                  linewidth=1.5, clip_on=False)  # fmt: skip
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below, fontsize=9)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def draw_sums(found: Mapping[str, Mapping[float, Point]], n: Mapping[str, int], path: Path) -> None:
    drawing = new_figure(8.4, 3.2)
    row = drawing.subplots(1, 3, sharey=True)
    for axes, question in zip(row, QUESTIONS, strict=True):
        curves = {label: {c: p[question] for c, p in points.items()} for label, points in found.items()}
        panel(axes, curves, f"{question} (n = {n[question]})", "coefficient")
    row[0].legend(frameon=False, fontsize=8, loc="lower right")
    smaller(save_figure(drawing, path))


def draw_negation(negated: Mapping[float, Point], forgot: Mapping[str, ForgetFirst], edits: int, path: Path) -> None:
    drawing = new_figure(8.4, 3.4)
    left, right = drawing.subplots(1, 2, sharey=True)
    names = list(next(iter(negated.values())))
    panel(left, {name: {c: p[name] for c, p in negated.items()} for name in names},
          f"a delta of {edits} new facts", "coefficient (1: the edit, 0: the base)")  # fmt: skip
    left.axvline(0, color="grey", linewidth=0.8)
    left.legend(frameon=False, fontsize=8, loc="center left")
    curves = {
        f"{name}: length {found.length:.1%}": {m.coefficient: m.probability for m in found.measured}
        for name, found in forgot.items()
    }
    panel(right, curves, "old answers subtracted: their probability", "length subtracted, over the weights' own")
    right.legend(frameon=False, fontsize=8, loc="upper right", title="the trained difference", title_fontsize=8)
    smaller(save_figure(drawing, path))


def smaller(path: Path) -> None:
    """Save a figure with a palette, which takes a third of the bytes."""
    from PIL import Image

    with Image.open(path) as picture:
        reduced = picture.convert("RGB").quantize(64)
    reduced.save(path, optimize=True)


def main() -> None:
    parser = arguments(__doc__, edits=24, epochs=60)
    parser.add_argument("--model", choices=["world", "factlm"], default="world")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--figures",
        type=Path,
        help="folder for the figures; default: recipes/figures, or the folder of the results with --quick",
    )
    options = parser.parse_args()
    folder = options.figures or (options.results.parent if options.quick else ROOT / "recipes" / "figures")
    if options.quick:
        options.edits, options.epochs = 2, 4
    torch.set_num_threads(1)
    bench, name = Bench(options), options.model
    few = options.quick
    added, angle = sums(bench, (0.0, 1.0) if few else (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0))
    negated = negation(bench, (-1.0, 1.0) if few else (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0))
    forgot = forgetting(bench, (0.5,) if few else (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4))
    held = bench.delta(bench.first)
    # The coefficient is chosen on half of the edits and evaluated on the other half.
    half = len(bench.first) // 2
    asked, others = bench.first[:half], bench.first[half:]
    grid = (0.5, 1.0) if few else (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)
    swept = sweep(
        bench.model,
        held,
        lambda model: bench.scores(asked, model),
        coefficients=grid,
        keep_locality=0.0 if few else 0.95,
    )
    after = bench.with_(swept.delta.vector(), 1.0, lambda: bench.scores(others))
    full = bench.with_(held.vector(), 1.0, lambda: bench.scores(others))
    count = bench.n
    suffix = "" if name == "world" else f"_{name}"
    draw_sums(added, count, folder / f"arithmetic_sum{suffix}.png")
    draw_negation(negated, forgot, len(bench.first), folder / f"arithmetic_negation{suffix}.png")
    smaller(sweep_plot(swept, folder / f"arithmetic_sweep{suffix}.png"))

    def cells(point: Point) -> list[str]:
        return [f"{value:.2f}" for value in point.values()]

    body = [
        f"{name}; one down-projection, Adam at {options.lr:g}, at most {options.epochs} epochs, until the loss is "
        f"0.01; generated exact match. Two halves of {len(bench.first)} edits; cosine of their deltas {angle:.3f}.",
        table(
            ["(a) both halves", "coefficient", *(f"{q} (n = {count[q]})" for q in QUESTIONS)],
            [[label, f"{c:g}", *cells(p)] for label, points in added.items() for c, p in points.items()],
        ),
        table(
            [f"(b) one half's delta, n = {len(bench.first)}", *next(iter(negated.values()))],
            [[f"{c:g}", *cells(p)] for c, p in negated.items()],
        ),
        table(
            ["(b) old answers subtracted", "length", "coefficient of the paper", "probability", "still given",
             "perplexity"],
            [[label, f"{m.coefficient:g}", f"{m.factor:.2f}",
              f"{m.probability:.3f}", f"{m.accuracy:.2f}", f"{m.perplexity:.2f}"]
             for label, f in forgot.items() for m in f.measured],
        ),
        table(
            [f"(c) chosen on {half} edits ({swept.best.coefficient:g}), scored on {len(others)} others", *QUESTIONS],
            [["picked", *cells(after)], ["the whole delta", *cells(full)]],
        ),
        f"(c) {swept.rule}.",
    ]  # fmt: skip
    record(f"Arithmetic with edits, {name}{', tiny' if few else ''}", "\n\n".join(body), options)


if __name__ == "__main__":
    main()
