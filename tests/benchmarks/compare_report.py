"""The comparison as tables and a picture, put into recipes/README.md."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from methods import RECIPES as ORDER
from paired import processor

from kedit_train.evaluation.reporting.plots import figure, saved

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BEGIN, END = "<!-- compare: written by make compare -->", "<!-- compare: end -->"
FRONT = ("reliability", "generality", "locality")
COLUMNS = {
    "reliability": 2, "generality": 2, "portability": 2, "locality": 2, "resurgence": 2, "drift": 2, "perplexity": 2,
    "seconds": 3, "memory": 0,
}  # fmt: skip
HEADS = (
    "reliability", "generality", "portability", "locality", "old answer likelier", "drift", "perplexity, times",
    "s an edit", "memory, MB",
)  # fmt: skip
TITLES = {
    "batch": "A batch of {n}",
    "single": "Single: each of {n} on the unedited model",
    "sequential": "In sequence: {n}, one after the other",
}
Rows = dict[str, list[dict[str, Any]]]


def grouped(results: list[dict[str, Any]]) -> dict[tuple[str, str], Rows]:
    """(model, mode) -> recipe -> its draws; what failed is told by ``write``."""
    found: dict[tuple[str, str], Rows] = defaultdict(lambda: defaultdict(list))
    order = [*ORDER, *(row["recipe"] for row in results)]
    for row in sorted(results, key=lambda row: (order.index(row["recipe"]), row["draw"])):
        if "error" not in row:
            times = row["perplexity"] and row["perplexity"] / row["perplexity before"]
            found[row["model"], row["mode"]][row["recipe"]].append(row | {"perplexity": times})
    return found


def mean(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return statistics.fmean(values) if values else None


def front(rows: Rows) -> set[str]:
    """Recipes that no other one equals or beats in reliability, generality and locality, and beats in one."""
    points = {name: tuple(mean(each, score) or 0.0 for score in FRONT) for name, each in rows.items()}
    return {
        name
        for name, own in points.items()
        if not any(all(a >= b for a, b in zip(other, own, strict=True)) and other != own for other in points.values())
    }


def cell(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    if not values:
        return "-"
    if name == "memory":
        # Draws run in one process, whose peak only grows.
        values = [min(values)]
    middle = f"{statistics.fmean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(rows: Rows) -> str:
    """A column that says nothing (the same in every row) is left out; draws are told where recipes differ in them."""
    best, differ = front(rows), len({len(each) for each in rows.values()}) > 1
    columns = {
        head: [cell(each, column, digits) for each in rows.values()]
        for head, (column, digits) in zip(HEADS, COLUMNS.items(), strict=True)
    }
    columns = {head: cells for head, cells in columns.items() if len({cell.split()[0] for cell in cells}) > 1}
    lines = [f"| recipe | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for (name, each), *cells in zip(rows.items(), *columns.values(), strict=True):
        shown = f"**{name}**" if name in best else name
        lines.append(f"| {f'{shown}, {len(each)}' if differ else shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(groups: dict[tuple[str, str], Rows], path: Path) -> None:
    """Generality to the right, locality upwards; hollow where fewer than 95 % of the edits took."""
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    models, modes = ([*dict.fromkeys(key[i] for key in groups)] for i in (0, 1))
    modes = [mode for mode in TITLES if mode in modes]
    names = [*dict.fromkeys(name for rows in groups.values() for name in rows)]
    shown: dict[str, Any] = {}
    drawing = figure(4.2 * len(modes), 3.6 * len(models) + 0.6)
    axes = drawing.subplots(len(models), len(modes), squeeze=False)
    for ax in (ax for row in axes for ax in row):
        ax.set_visible(False)
    for (model, mode), rows in groups.items():
        ax = axes[models.index(model)][modes.index(mode)]
        ax.set_visible(True)
        count = next(iter(rows.values()))[0]["edits"]
        ax.set(title=f"{model}, {mode} ({count})", xlabel="generality", ylabel="locality")
        for name, each in rows.items():
            at = names.index(name)
            colour, shape = colours[at % len(colours)], "os^Dv"[at // len(colours)]
            if name == "kedit_default":
                colour, shape = "#CC0000", "*"
            took = (mean(each, "reliability") or 0.0) >= 0.95
            x, y = mean(each, "generality") or 0.0, mean(each, "locality") or 0.0
            face = colour if took else "none"
            size = 14 if shape == "*" else 8
            ax.plot(x, y, shape, color=colour, markerfacecolor=face, markersize=size)
            # For the legend alone, which has no hollow markers.
            shown[name] = ax.plot([], [], shape, color=colour, markersize=size)[0]
        ax.grid(color="0.9")
    drawing.legend([shown[name] for name in names], names, loc="outside lower center", ncols=7, fontsize=8)
    saved(drawing, path)


def write(results: list[dict[str, Any]]) -> None:
    """Replace what stands between the marks in recipes/README.md, and the picture beside it."""
    groups = grouped(results)
    if not groups:
        raise SystemExit("nothing has been measured yet: run the comparison first")
    where = f"{processor()}, {os.cpu_count()} cores, one thread a run"
    parts = [
        BEGIN,
        f"Measured up to {date.today()}: {where}, Python {platform.python_version()}, torch {torch.__version__}.",
        "![Generality against locality, a marker for each recipe](figures/compare.png)",
        "Hollow: fewer than 95 % of the edits took.",
    ]
    for model, mode in sorted(groups, key=lambda key: (key[0] != "world", [*TITLES].index(key[1]))):
        rows = groups[model, mode]
        draws = sorted({len(each) for each in rows.values()})
        told = "draws beside the names" if len(draws) > 1 else f"{draws[0]} draw{'s' if draws[0] > 1 else ''}"
        title = TITLES[mode].format(n=next(iter(rows.values()))[0]["edits"])
        parts += [f"### {model}: {title} ({told})", table(rows)]
    failed = [
        f"{r['model']}, {r['recipe']}, {r['mode']}, draw {r['draw']}: {r['error']}" for r in results if "error" in r
    ]
    parts += [f"Not run: {'; '.join(failed)}."] if failed else []
    readme = RECIPES / "README.md"
    text = readme.read_text()
    body = "\n\n".join([*parts, END])
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    text = pattern.sub(lambda _: body, text) if pattern.search(text) else f"{text.rstrip()}\n\n{body}\n"
    readme.write_text(text)
    draw(groups, RECIPES / "figures" / "compare.png")
    print(f"{readme} and figures/compare.png")
