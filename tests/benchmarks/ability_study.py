"""Edit SmolLM2 1, 10 and 100 times, and measure its general abilities after the edits.

    python tests/benchmarks/ability_study.py                                   # seeds 10 to 12, into docs/results.md
    python tests/benchmarks/ability_study.py --methods ft_m --seeds 100
    python tests/benchmarks/ability_study.py report                            # write table and figure only

The edits are CounterFact records. FT-M and ``one_by_one.py`` make them one after the other, and train earlier edits
never again. For the gated adapter, which is a memory outside the weights, one adapter is trained on the first 1, 10 or
100 edits together. After 1, 10 and 100 edits, the built-in items of ``CapabilityProbe`` measure arithmetic, grammar,
copying and reading. "Navigating the Dual Facets" (arXiv 2402.11122) found that changed weights lose ability with each
edit, and that a memory keeps it, but recalls less if the question has another format.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_report import PAGE, replaced
from methods import Method, load_recipe
from result_rows import add_measurement, read_rows
from settings import SETTINGS, Setting, load

from kedit_train import CapabilityProbe
from kedit_train.callbacks import GatedAdapter, StopWhenEdited, TokenLoss
from kedit_train.data import Edit
from kedit_train.evaluation import EvaluationOptions, Report, evaluate
from kedit_train.evaluation.reporting.plots import color_and_marker, new_figure, save_figure
from kedit_train.modes import TrainLoop, run_edits

RESULTS = Path(__file__).with_name("ability_study.jsonl")
FIGURE = PAGE.parent / "images" / "ability_study.png"
MODEL, COUNTS = "smollm2", (1, 10, 100)
ABILITIES = ("arithmetic", "grammar", "copying", "reading")
GATED = "gated"
METHODS = {"ft_m": "FT-M", "one_by_one": "`one_by_one.py`", GATED: "`GatedAdapter`"}
# Held texts of the gate, and held prompts per edit.
HELD, NEIGHBORS = 300, 8
OPTIONS = EvaluationOptions(metrics=["format"], max_new_tokens=16)
COLUMNS = (
    *((name, 2) for name in ABILITIES), ("perplexity", 1), ("reliability", 2), ("generality", 2), ("question", 2),
    ("others", 2), ("seconds", 1),
)  # fmt: skip
HEADINGS = (
    "training", "edits", *ABILITIES, "perplexity", "reliability", "generality", "as a question", "others kept",
    "s per edit",
)  # fmt: skip


def sequence(name: str, setting: Setting, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Make the edits one after the other, and return one row for each number of edits, beginning with 0."""
    model, tokenizer = load(setting.path)
    edits = setting.edits(max(counts))
    method = Method(setting, model, tokenizer, name, load_recipe(name, model=MODEL), edits, "sequential")
    seconds: list[float] = []

    def train(model: Any, edits: Any) -> None:
        began = time.process_time()
        method(model, edits)
        seconds.append(time.process_time() - began)

    result = run_edits(
        model, tokenizer, edits, mode="sequential", train=train, checkpoints=counts, progress=False,
        capability=CapabilityProbe(setting.unrelated(), abilities=True), options=OPTIONS,
    )  # fmt: skip
    yield {"edits": 0, **abilities(result.capability)}
    for point in result.checkpoints:
        row = {"edits": point.edits, **abilities(point.capability), **scores(point.report)}
        if point.edits > 1:
            # The first edit is not counted, because it also reads the texts for all other edits.
            row["seconds"] = sum(seconds[1 : point.edits]) / (point.edits - 1)
        yield row


def together(setting: Setting, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Train a gated adapter on each number of edits, with the settings of gated.py, and return one row for each."""
    probe = CapabilityProbe(setting.unrelated(), abilities=True)
    for count in counts:
        model, tokenizer = load(setting.path)
        edits = setting.edits(count)
        before = evaluate(model, tokenizer, edits, options=OPTIONS, progress=False)
        torch.manual_seed(0)
        began = time.process_time()
        adapted = train_gate(setting, model, tokenizer, edits)
        used = (time.process_time() - began) / count
        report = evaluate(adapted.eval(), tokenizer, edits, options=OPTIONS, unedited=before, progress=False)
        yield {"edits": count, **abilities(probe(adapted, tokenizer)), **scores(report), "seconds": used}


def train_gate(setting: Setting, model: Any, tokenizer: Any, edits: Sequence[Edit]) -> Any:
    """Return the model with a gated adapter that was trained on the edits, with the settings of gated.py."""
    from peft import LoraConfig, get_peft_model

    blocks = list(range(15, 30))
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["up_proj", "down_proj"], layers_to_transform=blocks)
    adapted: Any = get_peft_model(model, lora)
    gate = GatedAdapter(setting.texts([])[:HELD], neighbors=NEIGHBORS, edits=edits)
    loop = TrainLoop(
        tokenizer, callbacks=[TokenLoss(reduction="sample"), StopWhenEdited(loss=0.01), gate], epochs=60,
        batch_size=setting.batch_size, learning_rate=2e-3, stop_loss=0.0,
    )  # fmt: skip
    loop(adapted, edits)
    return adapted


def scores(report: Report) -> dict[str, float | None]:
    """Return the scores on all edits so far."""
    of = report.metrics
    return {
        "reliability": of["reliability"]["generated"].value,
        "generality": of["generality"]["generated"].value,
        "PS": of["generality"]["probability"].value,
        "question": of["generality"]["by_kind"]["format"]["generated"].value,
        "others": of["locality"]["by_kind"]["others"]["generated"].value,
    }


def abilities(capability: Any) -> dict[str, float]:
    """Return the fraction of right items for each ability, and the perplexity."""
    scores = capability.scores()
    found = {name: scores[f"ability/{name}"].value for name in ABILITIES}
    return {**found, "perplexity": scores["perplexity"].value}


def points(rows: Sequence[dict[str, Any]], method: str) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of the reported seeds, by number of edits."""
    own = [row for row in rows if row["seed"] < 100 and row["method"] == method]
    return {count: [r for r in own if r["edits"] == count] for count in sorted({r["edits"] for r in own})}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table in Markdown with the means over the seeds."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    for number, (method, label) in enumerate(METHODS.items()):
        for count, own in points(rows, method).items():
            if count == 0 and number:
                continue
            cells = (
                f"{sum(r[key] for r in own) / len(own):.{digits}f}" if key in own[0] else "–" for key, digits in COLUMNS
            )
            lines.append(f"| {label if count else 'none (unedited)'} | {count} | {' | '.join(cells)} |")
    return lines


def figure(rows: Sequence[dict[str, Any]]) -> None:
    """Draw the mean of the four abilities and the perplexity over the number of edits, with the range of the seeds."""
    drawing = new_figure(8.4, 3.8)
    left, right = drawing.subplots(1, 2)
    counts = sorted({row["edits"] for row in rows if row["seed"] < 100})
    unedited = [row for row in rows if row["seed"] < 100 and row["edits"] == 0]
    for number, (method, label) in enumerate(METHODS.items()):
        # The rows of GatedAdapter begin with one edit. Before the edits, all methods have the same model.
        if found := points(rows, method):
            _curve(left, {0: unedited} | found, counts, number, label, lambda r: sum(r[n] for n in ABILITIES) / 4)
            _curve(right, {0: unedited} | found, counts, number, label, lambda r: r["perplexity"])
    # What a model reaches that guesses: a half in grammar and a quarter in the other abilities.
    left.axhline((0.5 + 3 * 0.25) / 4, color="grey", linestyle="--", linewidth=1, label="guessing")
    left.set_ylim(0.25, 0.85)
    left.set_ylabel("right items, mean of four abilities")
    right.set_ylabel("perplexity on prose")
    left.legend(frameon=False, fontsize=9, loc="center left")
    for axes in (left, right):
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_xlabel("number of edits")
        axes.grid(alpha=0.3)
    save_figure(drawing, FIGURE)


def _curve(axes: Any, found: dict[int, Any], counts: list[int], number: int, label: str, value: Any) -> None:
    """Draw the means of a value over the number of edits, and the range of the seeds."""
    color, marker = color_and_marker(number)
    positions = [counts.index(count) for count in found]
    values = [[value(row) for row in own] for own in found.values()]
    axes.plot(positions, [sum(v) / len(v) for v in values], color=color, marker=marker, label=label.strip("`"))
    axes.fill_between(
        positions, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, linewidth=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds if options.what == "run" else ():
        for method in options.methods:
            setting = SETTINGS[MODEL](seed)
            found = together(setting, options.counts) if method == GATED else sequence(method, setting, options.counts)
            for row in ({"method": method, "seed": seed, **row} for row in found):
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                # Rows on which settings are chosen are not kept.
                if seed < 100:
                    add_measurement(RESULTS, row)
    if rows := read_rows(RESULTS):
        marks = "<!-- ability study: written by ability_study.py -->", "<!-- ability study: end -->"
        PAGE.write_text(replaced(PAGE.read_text(), marks, ["\n".join(table(rows))]))
        figure(rows)


if __name__ == "__main__":
    main()
