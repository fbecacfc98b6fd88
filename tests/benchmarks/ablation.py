"""Edit SmolLM2 with variations of kedit_default, to see what each part does: layers, null space, steps, penalty, texts.

    python tests/benchmarks/ablation.py                        # what ablation.jsonl does not hold, into docs/results.md
    python tests/benchmarks/ablation.py --only "null space, 9 layers"
    python tests/benchmarks/ablation.py report                 # write the table only

All variants edit the 50 facts of draw 100, on which settings are chosen and no recipe is reported. A variant takes
three to seven minutes of one core. With second-order steps and a KL penalty, it takes 20 minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from compare import measure
from compare_report import PAGE, replaced
from paired import processor
from phases import STATISTICS, Phases, statistics_of_texts, timed
from result_rows import add_row, read_rows
from settings import HELD_OUT, smollm2

RESULTS = Path(__file__).with_name("ablation.jsonl")
EDITS, TEXTS = 50, 3300
COLUMNS = (
    ("reliability", 2), ("PS", 2), ("others", 2), ("NS", 2), ("KL", 4), ("training", 0),
)  # fmt: skip
HEADINGS = ("variant", "reliability", "PS", "others kept", "NS", "KL on prose", "training, s")


def variant(layers: Any, *others: tuple[str, Mapping[str, Any]], rate: float = 1e-3, stop: float = 0.01,
            epochs: int = 80, prefixes: int = 0) -> dict[str, Any]:  # fmt: skip
    """Return a recipe: cross-entropy on the down-projections of some layers, with further callbacks."""
    chosen = [
        ("ParameterScope", {"layers": layers, "modules": "mlp.down_proj.weight"}),
        ("TokenLoss", {"objective": "cross_entropy", "reduction": "sample"}),
        *others,
        ("PrefixCache", {}),
        ("StopWhenEdited", {"loss": stop}),
    ]
    data = {"path": "world", "batch_size": 12}
    trainer = {
        "max_epochs": epochs,
        "logger": False,
        "callbacks": [{"class_path": f"kedit_train.callbacks.{name}", "init_args": dict(a)} for name, a in chosen],
    }
    return {
        "seed_everything": 0,
        "model": {"name": "world", "learning_rate": rate},
        "data": data | ({"augmentation": {"prefixes": prefixes}} if prefixes else {}),
        "trainer": trainer,
    }


def null_space(energy: float = 0.9, neighbors: int = 0) -> tuple[str, dict[str, Any]]:
    return "NullSpace", {"texts": "world", "energy": energy, "neighbors": neighbors, "batch_size": 64}


def penalty(strength: float) -> tuple[str, dict[str, Any]]:
    return "WeightAnchor", {"kind": "kfac", "texts": "world", "strength": strength, "limit": None}


def low_curvature() -> tuple[str, dict[str, Any]]:
    return "LowCurvature", {"texts": "world", "batch_size": 16}


def kl() -> tuple[str, dict[str, Any]]:
    return "KLLocality", {"texts": "world", "weight": 20.0, "batch_size": 16}


def second_order(**settings: Any) -> tuple[str, dict[str, Any]]:
    return "SecondOrderLocality", {"texts": "world", "step_size": 0.1, "damping": 0.1, "batch_size": 16, **settings}


def polyak(step_size: float) -> tuple[str, dict[str, Any]]:
    return "PolyakStep", {"step_size": step_size}


# Variants with fewer texts -> number of texts.
COUNTS = {f"{n} texts": n for n in (22, 217, 1000)}
# The learning rate of Adam is lower for more layers, because more weights move.
VARIANTS: dict[str, Any] = {
    "plain fine-tuning, 1 layer (ft_m)": "ft_m",
    "null space, 1 layer, rate 5e-3, 40 epochs (null_space)": "null_space",
    "null space, 1 layer": variant(0.66, null_space(), rate=1e-2),
    "null space, 3 layers (0.63-0.73)": variant("0.63-0.73", null_space(), rate=3e-3),
    "null space, 5 layers (0.6-0.75)": variant("0.6-0.75", null_space(), rate=2e-3),
    "null space, 9 layers (0.5-0.8)": variant("0.5-0.8", null_space()),
    "null space, 15 layers (0.4-0.9)": variant("0.4-0.9", null_space(), rate=6e-4),
    "null space, 21 layers (0.3-1.0)": variant("0.3-1.0", null_space(), rate=3e-4),
    "9 layers, energy 0.95, rate 1.5e-3": variant("0.5-0.8", null_space(0.95), rate=1.5e-3),
    "9 layers, stop at 0.001": variant("0.5-0.8", null_space(), stop=0.001),
    "9 layers, 1 prefix per edit, stop at 0.02": variant("0.5-0.8", null_space(), stop=0.02, prefixes=1),
    "9 layers, PolyakStep 0.05": variant("0.5-0.8", null_space(), polyak(0.05)),
    "9 layers, PolyakStep 0.1": variant("0.5-0.8", null_space(), polyak(0.1)),
    "9 layers, PolyakStep 0.05, 8 neighbors": variant("0.5-0.8", null_space(neighbors=8), polyak(0.05)),
    "9 layers, PolyakStep 0.05, 24 neighbors (kedit_default)": "kedit_default",
    "12 layers (0.4-0.8), PolyakStep 0.07, 24 neighbors": variant("0.4-0.8", null_space(neighbors=24), polyak(0.07)),
    "null space, 1 layer, KL penalty, 40 epochs": variant(0.66, null_space(), kl(), rate=1e-2, epochs=40),
    "second-order steps (inputs), 3 layers": variant("0.63-0.73", second_order(factors="inputs", damping=0.01)),
    "second-order steps (K-FAC), 1 layer, stop at 0.001": variant(0.66, second_order(), stop=0.001),
    "the same with null space": variant(0.66, second_order(), null_space(), stop=0.001),
    "second-order steps and KL penalty, 21 layers, stop at 0.001": variant(
        "0.3-1.0", second_order(step_size=0.2, limit=1024), kl(), stop=0.001
    ),
    "9 layers, no constraint": variant("0.5-0.8", polyak(0.05)),
    "9 layers, K-FAC penalty 100": variant("0.5-0.8", penalty(100.0), polyak(0.05)),
    "9 layers, K-FAC penalty 1000": variant("0.5-0.8", penalty(1000.0), polyak(0.05)),
    "9 layers, second-order steps (inputs)": variant("0.5-0.8", second_order(step_size=0.05, factors="inputs")),
    "9 layers, second-order steps (K-FAC), damping 0.01": variant(
        "0.5-0.8", second_order(step_size=0.05, damping=0.01)
    ),
    "9 layers, second-order steps (K-FAC)": variant("0.5-0.8", second_order(step_size=0.05)),
    "9 layers, second-order steps (K-FAC), damping 1": variant("0.5-0.8", second_order(step_size=0.05, damping=1.0)),
    "9 layers, second-order steps and K-FAC penalty": variant("0.5-0.8", second_order(step_size=0.05), penalty(100.0)),
    "9 layers, low curvature": variant("0.5-0.8", low_curvature(), polyak(0.05)),
    "9 layers, KL penalty": variant("0.5-0.8", kl(), polyak(0.05)),
    **dict.fromkeys(COUNTS, "kedit_default"),
}
NULL_SPACE, NEIGHBORS = "9 layers, PolyakStep 0.05", "9 layers, PolyakStep 0.05, 24 neighbors (kedit_default)"
# The table of constraints: label of the row -> variant. All train nine layers (0.5 to 0.8) with a step size of 0.05.
CONSTRAINTS = {
    "none": "9 layers, no constraint",
    "K-FAC penalty, strength 100": "9 layers, K-FAC penalty 100",
    "K-FAC penalty, strength 1000": "9 layers, K-FAC penalty 1000",
    "second-order steps, input moments only": "9 layers, second-order steps (inputs)",
    "second-order steps, K-FAC, damping 0.01": "9 layers, second-order steps (K-FAC), damping 0.01",
    "second-order steps, K-FAC, damping 0.1": "9 layers, second-order steps (K-FAC)",
    "second-order steps, K-FAC, damping 1": "9 layers, second-order steps (K-FAC), damping 1",
    "second-order steps and K-FAC penalty": "9 layers, second-order steps and K-FAC penalty",
    "low curvature": "9 layers, low curvature",
    "null space": NULL_SPACE,
    "null space and 24 neighbors": NEIGHBORS,
    "KL penalty on 16 texts per step": "9 layers, KL penalty",
}
# The table of kedit_default with fewer texts.
FEWER_TEXTS = {f"{n:,} texts": name for name, n in COUNTS.items()} | {f"{TEXTS:,} texts": NEIGHBORS}
# The first table shows the other variants.
_ELSEWHERE = {*CONSTRAINTS.values(), *COUNTS} - {NULL_SPACE, NEIGHBORS}
PARTS = {name: name for name in VARIANTS if name not in _ELSEWHERE}
TABLES = {"ablation": PARTS, "constraints": CONSTRAINTS, "fewer texts": FEWER_TEXTS}


def run(name: str) -> dict[str, Any]:
    """Train and evaluate one variant."""
    chosen = VARIANTS[name]
    phases = Phases(time.process_time)
    with TemporaryDirectory() as folder, timed(phases, statistics_of_texts()):
        recipe = chosen if isinstance(chosen, str) else str(Path(folder) / "variant.yaml")
        if recipe != chosen:
            Path(recipe).write_text(yaml.safe_dump(chosen))
        found = measure(smollm2(HELD_OUT), recipe, "batch", HELD_OUT, EDITS, few=COUNTS.get(name, TEXTS))
    statistics = phases.stop().get(STATISTICS, 0.0)
    scores = {score: found[score] for score in ("reliability", "generality", "PS", "others", "neighbors", "NS", "KL")}
    return {"variant": name, **scores, "training": found["seconds"] * EDITS - statistics, "statistics": statistics}


def table(rows: list[dict[str, Any]], labels: Mapping[str, str]) -> str:
    """Return a table in Markdown: the measured variants, under their labels and in the order of the labels."""
    by_name = {row["variant"]: row for row in rows}
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for label, name in labels.items():
        if name in by_name:
            values = ((by_name[name][score], digits) for score, digits in COLUMNS)
            cells = ("-" if value is None else f"{value:.{digits}f}" for value, digits in values)
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], page: str) -> str:
    """Return the page with all tables."""
    for title, labels in TABLES.items():
        marks = f"<!-- {title}: written by ablation.py -->", f"<!-- {title}: end -->"
        page = replaced(page, marks, [table(rows, labels)])
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--only", action="append", choices=VARIANTS, metavar="NAME", help="the name of a variant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(RESULTS)
    known = {row["variant"] for row in rows}
    for name in (options.only or VARIANTS) if options.what == "run" else ():
        if name not in known:
            row = run(name) | {"machine": f"{processor()}, torch {torch.__version__}"}
            rows.append(row)
            add_row(RESULTS, row)
            print(table([row], {name: name}).splitlines()[-1], flush=True)
    PAGE.write_text(report(rows, PAGE.read_text()))


if __name__ == "__main__":
    main()
