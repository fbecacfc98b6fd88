"""Write the comparison of recipes into docs/results.md: one table per model and mode, and a scatter plot."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

from methods import ALONE, LEARNING_RATES, ON_SMOLLM2, OTHERWISE, RECIPES, judged

from kedit_train.evaluation.reporting.plots import new_figure, save_figure

ROOT = Path(__file__).resolve().parents[2]
PAGE, FIGURE = ROOT / "docs" / "results.md", ROOT / "recipes" / "figures" / "compare.png"
# The two places in the page that are written: the tables of the pretrained model, and those of the two small models.
PRETRAINED = "<!-- compare, pretrained: written by make compare -->", "<!-- compare, pretrained: end -->"
SMALL = "<!-- compare: written by make compare -->", "<!-- compare: end -->"
# The columns of a table: score, digits and heading.
COLUMNS = (
    ("reliability", 2, "reliability"), ("generality", 2, "generality"), ("portability", 2, "portability"),
    ("locality", 2, "locality"), ("resurgence", 2, "old answer preferred"), ("drift", 2, "drift"),
    ("perplexity", 2, "perplexity ratio"), ("times", 1, "time / ft_m"), ("memory", 0, "memory, MB"),
)  # fmt: skip
COMPLETIONS = (
    ("reliability", 2, "reliability"), ("generality", 2, "generality"), ("PS", 2, "PS"),
    ("portability", 2, "portability"), ("others", 2, "others kept"), ("NS", 2, "NS"), ("KL", 4, "KL on prose"),
    ("perplexity", 2, "perplexity ratio"), ("times", 1, "time / ft_m"),
)  # fmt: skip
LABELS = {"others": "others kept"}
MODELS = {"smollm2": "SmolLM2", "smollm2_zsre": "SmolLM2 on ZsRE", "world": "world", "factlm": "factlm"}
ORDER = tuple(dict.fromkeys((*RECIPES, *ON_SMOLLM2)))
TITLES = {
    "batch": "{n} edits in one batch",
    "single": "{n} single edits, each on the unedited model",
    "sequential": "{n} edits in sequence",
}
Rows = dict[str, list[dict[str, Any]]]


def grouped(results: list[dict[str, Any]]) -> dict[tuple[str, str], Rows]:
    """Return (model, mode) -> recipe -> results of its draws, without failed runs.

    If a draw was measured twice, for example on a second machine, the last result counts.
    """
    groups: dict[tuple[str, str], Rows] = defaultdict(lambda: defaultdict(list))
    order = [*ORDER, *(row["recipe"] for row in results)]
    finished = [row for row in results if "error" not in row]
    last = {(row["model"], row["mode"], row["recipe"], row["draw"]): row for row in finished}
    for row in sorted(last.values(), key=lambda row: (order.index(row["recipe"]), row["draw"])):
        ratio = row["perplexity"] and row["perplexity"] / row["perplexity before"]
        values = {"perplexity": ratio, "times": times(row, finished)}
        groups[row["model"], row["mode"]][row["recipe"]].append(row | values)
    return groups


def times(row: dict[str, Any], results: list[dict[str, Any]]) -> float | None:
    """Return the time of a run divided by the mean time of ft_m for the same model and mode on the same machine."""
    same = ("model", "mode", "machine")
    plain = [r for r in results if r["recipe"] == "ft_m" and all(r.get(key) == row.get(key) for key in same)]
    return row["seconds"] / statistics.fmean(r["seconds"] for r in plain) if plain and row.get("seconds") else None


def mean(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def front(rows: Rows, model: str = "world") -> set[str]:
    """Return the recipes on the Pareto front of the scores that count for the model."""
    points = {name: tuple(mean(each, score) or 0.0 for score in judged(model)) for name, each in rows.items()}
    return {
        name
        for name, own in points.items()
        if not any(all(a >= b for a, b in zip(other, own, strict=True)) and other != own for other in points.values())
    }


def cell(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    """Format the mean over draws and half the distance between the smallest and the largest value."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return "-"
    if name == "memory":
        # All draws run in one process, and the peak of a process only grows.
        values = [min(values)]
    average = f"{statistics.fmean(values):.{digits}f}"
    return average if len(values) == 1 else f"{average} ± {(max(values) - min(values)) / 2:.{digits}f}"


def table(rows: Rows, model: str = "world") -> str:
    """Format one table, and write the number of draws where recipes differ in it.

    A column with one value in all rows is left out, unless its score decides which recipes are on the front.
    """
    best, differ = front(rows, model), len({len(each) for each in rows.values()}) > 1
    columns = {
        head: cells
        for column, digits, head in (COMPLETIONS if model.startswith("smollm2") else COLUMNS)
        if set(cells := [cell(each, column, digits) for each in rows.values()]) != {"-"}
        and (len(rows) == 1 or column in judged(model) or len({text.split()[0] for text in cells}) > 1)
    }
    lines = [f"| recipe | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for (name, each), *cells in zip(rows.items(), *columns.values(), strict=True):
        shown = f"**{name}**" if name in best else name
        lines.append(f"| {f'{shown}, {len(each)}' if differ else shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(groups: dict[tuple[str, str], Rows], path: Path) -> None:
    """Plot locality over generality; hollow markers have a reliability below 0.95.

    A model and mode with one recipe is left out, because there is nothing to compare.
    """
    groups = {key: rows for key, rows in groups.items() if len(rows) > 1} or groups
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    models, modes = ([*dict.fromkeys(key[i] for key in groups)] for i in (0, 1))
    modes = [mode for mode in TITLES if mode in modes]
    names = [*dict.fromkeys(name for rows in groups.values() for name in rows)]
    shown: dict[str, Any] = {}
    drawing = new_figure(4.2 * len(modes), 3.6 * len(models) + 0.6)
    axes = drawing.subplots(len(models), len(modes), squeeze=False)
    for ax in (ax for row in axes for ax in row):
        ax.set_visible(False)
    for (model, mode), rows in groups.items():
        ax = axes[models.index(model)][modes.index(mode)]
        ax.set_visible(True)
        count = next(iter(rows.values()))[0]["edits"]
        _, across, up = judged(model)
        ax.set(title=f"{MODELS[model]}, {mode} ({count})", xlabel=across, ylabel=LABELS.get(up, up))
        for name, each in rows.items():
            at = names.index(name)
            color, shape = colors[at % len(colors)], "os^Dv"[at // len(colors)]
            if name == "kedit_default":
                color, shape = "#CC0000", "*"
            reliable = (mean(each, "reliability") or 0.0) >= 0.95
            x, y = mean(each, across) or 0.0, mean(each, up) or 0.0
            face = color if reliable else "none"
            size = 14 if shape == "*" else 8
            ax.plot(x, y, shape, color=color, markerfacecolor=face, markersize=size)
            # An empty plot for the legend, which shows filled markers only.
            shown[name] = ax.plot([], [], shape, color=color, markersize=size)[0]
        ax.grid(color="0.9")
    drawing.legend([shown[name] for name in names], names, loc="outside lower center", ncols=7, fontsize=8)
    save_figure(drawing, path)


def notes(model: str, rows: Rows, mode: str = "batch") -> str:
    """Return the line below a table of SmolLM2: scores of the unedited model, learning rates and numbers of texts."""
    # A draw counts once, however many recipes were measured on it.
    every = [*{row.get("draw"): row for each in rows.values() for row in each}.values()]
    given = [f"{name} {mean(every, f'{name} before'):.2f}" for name in ("PS", "NS") if mean(every, f"{name} before")]
    parts = [f"Scores of the unedited model: {', '.join(given)}."] if given else []
    known = LEARNING_RATES.get(model.removesuffix("_zsre"), {})
    rates = {name: rate * (1.0 if mode == "batch" else ALONE) for name, rate in known.items() if name in rows}
    if rates:
        parts += ["Learning rates: " + ", ".join(f"`{name}` {rate:g}" for name, rate in rates.items()) + "."]
    if read := {name: each[-1]["texts"] for name, each in rows.items() if each[-1].get("texts")}:
        parts += ["Number of texts: " + ", ".join(f"`{name}` {count:,}" for name, count in read.items()) + "."]
    if other := {name: key for name, key in OTHERWISE.get(model, {}).items() if name in rows}:
        keys = (f"`{key.removeprefix('trainer.callbacks.')}` in `{name}`" for name, key in other.items())
        parts += [f"Changed to limit the time: {', '.join(keys)}."]
    return " ".join(parts)


def sections(groups: dict[tuple[str, str], Rows], pretrained: bool) -> list[str]:
    """Return the titles and tables of the pretrained model, or those of the two small models."""
    parts = []
    for model, mode in sorted(groups, key=lambda key: ([*MODELS].index(key[0]), [*TITLES].index(key[1]))):
        if model.startswith("smollm2") != pretrained:
            continue
        rows = groups[model, mode]
        draws = sorted({len(each) for each in rows.values()})
        title = f"### {MODELS[model]}: {TITLES[mode].format(n=next(iter(rows.values()))[0]['edits'])}"
        if len(draws) == 1:
            parts += [f"{title} ({draws[0]} draw{'s' if draws[0] > 1 else ''})"]
        else:
            parts += [title, "Each recipe is followed by the number of draws on which it was measured."]
        parts += [table(rows, model), *filter(None, [notes(model, rows, mode)])]
    return parts


def failures(results: list[dict[str, Any]], pretrained: bool) -> list[str]:
    failed = [
        f"{r['model']}, {r['recipe']}, {r['mode']}, draw {r['draw']}: {r['error']}"
        for r in results
        if "error" in r and r["model"].startswith("smollm2") == pretrained
    ]
    return [f"Runs that failed: {'; '.join(failed)}."] if failed else []


def replaced(text: str, marks: tuple[str, str], parts: list[str]) -> str:
    """Return the page with the text between two marks replaced, or with the section at its end."""
    begin, end = marks
    body = "\n\n".join([begin, *parts, end])
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: body, text) if pattern.search(text) else f"{text.rstrip()}\n\n{body}\n"


def write(results: list[dict[str, Any]]) -> None:
    """Replace the sections between the marks in docs/results.md, and the plot."""
    groups = grouped(results)
    if not groups:
        raise SystemExit("compare: the results file contains no finished run; run the comparison first")
    machines = ", ".join(sorted({row["machine"] for row in results if row.get("machine")}))
    written = f"Written on {date.today()} from compare.jsonl. Machines: {machines}; one thread per run."
    plot = "![Kept answers over generality, one marker per recipe](../recipes/figures/compare.png)"
    hollow = "Hollow markers show runs with a reliability below 0.95."
    text = replaced(
        PAGE.read_text(), PRETRAINED, [written, *sections(groups, pretrained=True), *failures(results, pretrained=True)]
    )
    parts = [written, plot, hollow, *sections(groups, pretrained=False), *failures(results, pretrained=False)]
    PAGE.write_text(replaced(text, SMALL, parts))
    draw(groups, FIGURE)
    print(f"wrote {PAGE} and {FIGURE}")
