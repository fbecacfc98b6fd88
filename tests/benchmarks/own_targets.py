"""Train SmolLM2 towards its own predictions (ContextTeacher, MixSD) and towards labels, on the same edits.

    python tests/benchmarks/own_targets.py  # run what is missing in own_targets.jsonl, update docs/results.md
    python tests/benchmarks/own_targets.py --model smollm2_zsre --draws 10
    python tests/benchmarks/own_targets.py report      # write the table only

Every variant is kedit_default with other targets. The 40 edits of a draw are facts that the unedited model follows when
it reads them in its context. A run takes about four minutes of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from compare import measure
from compare_report import PAGE, replaced
from paired import processor
from result_rows import add_row, read_rows
from settings import SETTINGS, Setting, load

from kedit_train.data import Edit
from kedit_train.data.fact_in_context import prompt_with_fact
from kedit_train.data.prompts import end_id, pair_ids

RESULTS = Path(__file__).with_name("own_targets.jsonl")
DEFAULT = Path(__file__).resolve().parents[2] / "recipes" / "kedit_default.yaml"
EDITS, CANDIDATES, TEXTS, DRAWS = 40, 300, 1000, (10, 11, 12)
CROSS_ENTROPY, TEACHER = "cross-entropy", "ContextTeacher"
VARIANTS = (CROSS_ENTROPY, TEACHER, "MixSD, rewrite 0.3", "MixSD, rewrite 0.5")
MODELS = {"smollm2": "CounterFact", "smollm2_zsre": "ZsRE"}
COLUMNS = (
    ("reliability", 2), ("generality", 2), ("PS", 2), ("portability", 2), ("others", 2), ("NS", 2), ("KL", 4),
    ("seconds", 1),
)  # fmt: skip
HEADINGS = (
    "edits", "draw", "targets", "reliability", "generality", "PS", "portability", "others kept", "NS", "KL on prose",
    "s per edit",
)  # fmt: skip


@torch.no_grad()
def follows(model: Any, tokenizer: Any, edit: Edit) -> bool:
    """Return whether the model ranks every token of the target first when it reads the new fact."""
    pair = pair_ids(tokenizer, prompt_with_fact(edit, edit.prompt), edit.target)
    # Without the token that ends an answer.
    ids = list(pair.input_ids)[: len(pair.input_ids) - (end_id(tokenizer) is not None)]
    predicted = model(torch.tensor([ids])).logits[0, pair.target_start - 1 : -1].argmax(-1)
    return predicted.tolist() == ids[pair.target_start :]


def followed(setting: Setting) -> list[Edit]:
    """Return the first edits of a draw that the model follows, with the probes of all other candidates."""
    model, tokenizer = load(setting.path)
    candidates = setting.edits(CANDIDATES)
    others = [probe for edit in candidates for probe in edit.locality["others"]]
    chosen: list[Edit] = []
    for edit in candidates:
        if follows(model, tokenizer, edit):
            chosen.append(edit)
        if len(chosen) == EDITS:
            break
    return [
        replace(edit, locality={**edit.locality, "others": tuple(others[i :: len(chosen)])})
        for i, edit in enumerate(chosen)
    ]


def recipe(targets: str) -> dict[str, Any]:
    """Return kedit_default with other targets."""
    default = yaml.safe_load(DEFAULT.read_text())
    if targets == TEACHER:
        (loss,) = (each for each in default["trainer"]["callbacks"] if each["class_path"].endswith(".TokenLoss"))
        loss |= {"class_path": "kedit_train.callbacks.ContextTeacher", "init_args": {"reduction": "sample"}}
    elif targets != CROSS_ENTROPY:
        default["data"]["augmentation"] = {"rewrite": float(targets.split()[-1])}
    return default


def run(model: str, targets: str, draw: int) -> dict[str, Any]:
    """Train and evaluate one variant."""
    setting = SETTINGS[model](draw)
    edits = followed(setting)
    setting = replace(setting, edits=lambda count: edits)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(targets)))
        found = measure(setting, str(path), "batch", draw, EDITS, few=TEXTS)
    key = {"model": model, "targets": targets, "draw": draw, "edits": len(edits)}
    return key | {name: found[name] for name, _ in COLUMNS}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table in Markdown with one line per draw and variant."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---:|---|" + "---:|" * (len(HEADINGS) - 3)]
    for model, label in MODELS.items():
        for draw in sorted({row["draw"] for row in rows if row["model"] == model}):
            for targets in VARIANTS:
                for row in rows:
                    if (row["model"], row["draw"], row["targets"]) == (model, draw, targets):
                        cells = " | ".join(cell(row[name], digits) for name, digits in COLUMNS)
                        lines.append(f"| {label} | {draw} | {targets} | {cells} |")
    return "\n".join(lines)


def cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def report(rows: list[dict[str, Any]], page: str) -> str:
    """Return the page with the table."""
    marks = "<!-- own targets: written by own_targets.py -->", "<!-- own targets: end -->"
    return replaced(page, marks, [table(rows)])


def missing(rows: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    known = {(row["model"], row["targets"], row["draw"]) for row in rows}
    for draw in options.draws:
        for targets in options.targets or VARIANTS:
            if (options.model, targets, draw) not in known:
                yield options.model, targets, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--targets", action="append", choices=VARIANTS)
    parser.add_argument("--draws", type=int, nargs="+", default=DRAWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(RESULTS)
    for key in missing(rows, options) if options.what == "run" else ():
        row = run(*key) | {"machine": f"{processor()}, torch {torch.__version__}"}
        rows.append(row)
        add_row(RESULTS, row)
        print(table([row]).splitlines()[-1], flush=True)
    PAGE.write_text(report(rows, PAGE.read_text()))


if __name__ == "__main__":
    main()
