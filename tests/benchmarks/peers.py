"""Compare the editors of EasyEdit and LocFT with our recipes: the same edits of SmolLM2, scored by our evaluator.

    python tests/benchmarks/peers.py PATH/TO/EasyEdit PATH/TO/LocFT          # draw 10, into docs/compare.md
    python tests/benchmarks/peers.py PATH/TO/EasyEdit --editors rome --draws 100 --edits 10 --set v_lr=0.1
    python tests/benchmarks/peers.py                                         # our recipes and the page only

The checkouts are yours: nothing is downloaded, and this project contains none of their code. An editor whose checkout
is missing or that does not load is skipped with one line. Each edited model is saved as a delta, and the delta is
applied to a new copy of the model before it is scored. Draws from 100 upwards are for choosing settings, and their
results are not kept.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ability_study import train_gate
from compare import RESULTS as COMPARED
from compare import SCORES, completions, done
from compare_report import ROOT, replaced
from methods import Method, load_recipe
from peer_editors import EDITORS, KEDIT_TRAIN, LOCFT, commit_of, project_of, run_easyedit, run_locft
from result_rows import add_measurement, read_rows
from settings import HELD_OUT, SETTINGS, Setting, load

from kedit_train import EditDelta
from kedit_train.data import Edit
from kedit_train.evaluation import EvaluationOptions, Report, evaluate

MODEL = "smollm2"
RESULTS, PAGE, DELTAS = Path(__file__).with_name("peers.jsonl"), ROOT / "docs" / "compare.md", ROOT / "runs" / "peers"
MARKS = "<!-- peers: written by peers.py -->", "<!-- peers: end -->"
COLUMNS = (
    ("reliability", 2, "reliability"), ("generality", 2, "generality"), ("PS", 2, "PS"), ("others", 2, "others kept"),
    ("NS", 2, "NS"), ("KL", 4, "KL on prose"), ("ratio", 2, "perplexity ratio"), ("seconds", 1, "s per edit"),
)  # fmt: skip
TITLES = {"batch": "{n} edits together", "sequential": "{n} edits, one after the other"}
Train = Callable[[Any, Any], Any]


def trainer(name: str, checkouts: Mapping[str, Path], setting: Setting, edits: Sequence[Edit], given: Any) -> Train:
    """Return a function of a model and its tokenizer that makes the edits and returns the edited model."""
    editor = EDITORS[name]
    if name == "gated":
        return lambda model, tokenizer: train_gate(setting, model, tokenizer, edits)
    if editor.project == KEDIT_TRAIN:
        return lambda model, tokenizer: _recipe(name, setting, model, tokenizer, edits)
    run = run_locft if editor.project == LOCFT else run_easyedit
    checkout, texts = checkouts[editor.project], setting.texts(edits)
    return lambda model, tokenizer: run(editor, checkout, model, tokenizer, edits, texts, given)


def _recipe(name: str, setting: Setting, model: Any, tokenizer: Any, edits: Sequence[Edit]) -> Any:
    recipe, mode = name.removeprefix("recipe_"), EDITORS[name].mode
    train = Method(setting, model, tokenizer, recipe, load_recipe(recipe, model=MODEL), edits, mode)
    for part in [edits] if mode == "batch" else [[edit] for edit in edits]:
        train(model, part)
    return model


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make a folder the current folder. Python 3.10 has no ``contextlib.chdir``."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def measure(
    setting: Setting, train: Train, edits: Sequence[Edit], *, unedited: Report, stored: Path | None, seed: int
) -> dict[str, Any]:
    """Make the edits, save them as a delta, apply the delta to a new copy of the model, and score this copy.

    Args:
        setting: the model and its texts.
        train: see :func:`trainer`.
        edits: the edits.
        unedited: the report on the unedited model.
        stored: the file for the delta. None: the edits are a memory beside the weights, and the model is scored as it
            is, one prompt at a time, because WISE decides for a whole batch whether to use its memory.
        seed: seed of all random numbers.
    """
    import numpy as np

    model, tokenizer = load(setting.path)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    began = time.process_time()
    # The editors print every step, and some write files into the current folder.
    with tempfile.TemporaryDirectory() as folder, inside(Path(folder)), contextlib.redirect_stdout(io.StringIO()):
        edited = train(model, tokenizer)
    seconds = (time.process_time() - began) / len(edits)
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        delta = EditDelta.between(setting.path, edited, edits=edits)
        if not delta.changes:
            raise RuntimeError("the editor changed no weight")
        delta.save(stored)
        edited, _ = load(setting.path)
        EditDelta.load(stored).apply(edited)
    _, tokenizer = load(setting.path)
    report = scored(edited.eval(), tokenizer, setting, edits, unedited, batch_size=1 if stored is None else 64)
    of = report.metrics
    return {
        **{name: of[name]["generated"].value for name in SCORES},
        **(completions(report, unedited) if report.protocols.headline == "leading" else {}),
        "ratio": of["perplexity"].value / unedited.metrics["perplexity"].value,
        "seconds": seconds,
    }


def scored(
    model: Any, tokenizer: Any, setting: Setting, edits: Sequence[Edit], unedited: Report | None, batch_size: int = 64
) -> Report:
    options = EvaluationOptions(max_new_tokens=16, prose=setting.unrelated(), batch_size=batch_size)
    return evaluate(model, tokenizer, edits, options=options, unedited=unedited, progress=False)


def run(options: argparse.Namespace, checkouts: Mapping[str, Path]) -> None:
    """Measure what is missing in the results, and print one line for each editor."""
    known = [*compared(), *(row for row in read_rows(options.results) if "error" not in row)]
    have = {(row["editor"], row["draw"], row["edits"]) for row in known}
    for draw in options.draws:
        setting, unedited = SETTINGS[MODEL](draw), None
        edits = setting.edits(options.edits)
        for name in options.editors:
            editor = EDITORS[name]
            if editor.project not in (KEDIT_TRAIN, *checkouts):
                print(f"peers: {name} is skipped: no checkout of {editor.project} was given", flush=True)
                continue
            if (name, draw, len(edits)) in have:
                continue
            unedited = unedited or scored(*load(setting.path), setting, edits, None)
            row = {"editor": name, "draw": draw, "edits": len(edits), "set": options.set}
            if editor.project in checkouts:
                row["commit"] = commit_of(checkouts[editor.project])
            train = trainer(name, checkouts, setting, edits, options.set)
            stored = None if editor.memory else options.deltas / f"{name}-{draw}.safetensors"
            try:
                row |= measure(setting, train, edits, unedited=unedited, stored=stored, seed=draw)
            except Exception as error:
                # An editor of another project may fail in any way, for example with a newer version of a library.
                if editor.project == KEDIT_TRAIN:
                    raise
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"peers: {name} is skipped: {row['error']}", flush=True)
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            if draw < HELD_OUT:
                add_measurement(options.results, row)


def compared() -> list[dict[str, Any]]:
    """Return what compare.py has measured of our recipes, as rows of this comparison."""
    ours = {(name.removeprefix("recipe_"), e.mode): name for name, e in EDITORS.items() if e.project == KEDIT_TRAIN}
    rows = [row for row in done(COMPARED) if row["model"] == MODEL and "error" not in row]
    keys = ("draw", "edits", "seconds", "machine", *(key for key, *_ in COLUMNS if key in rows[0])) if rows else ()
    return [
        {"editor": ours[row["recipe"], row["mode"]], "ratio": row["perplexity"] / row["perplexity before"]}
        | {key: row[key] for key in keys}
        for row in rows
        if (row["recipe"], row["mode"]) in ours
    ]


def reported(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last row of each editor, draw and number of edits, in the order of ``EDITORS``."""
    order = list(EDITORS)
    last = {(row["editor"], row["draw"], row["edits"]): row for row in rows if row["draw"] < HELD_OUT}
    return sorted(last.values(), key=lambda row: (order.index(row["editor"]), row["draw"]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown with one line per editor, and means over its draws."""
    lines = [f"| editor | from | {' | '.join(head for *_, head in COLUMNS)} |", "|---|---|" + "---:|" * len(COLUMNS)]
    for name in dict.fromkeys(row["editor"] for row in rows):
        own = [row for row in rows if row["editor"] == name]
        cells = (f"{statistics.fmean(row[key] for row in own):.{digits}f}" for key, digits, _ in COLUMNS)
        lines.append(f"| {EDITORS[name].label} | {EDITORS[name].project} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machines(rows: Sequence[dict[str, Any]]) -> str:
    """Return the machine of most rows, and the other machines with their editors."""
    editors: dict[str, list[str]] = {}
    for row in rows:
        if machine := row.get("machine", "").partition(",")[0]:
            editors.setdefault(machine, []).append(EDITORS[row["editor"]].label)
    usual, *others = sorted(editors, key=lambda machine: len(editors[machine]), reverse=True) or [""]
    listed = [f"{', '.join(dict.fromkeys(editors[machine]))} on {machine}" for machine in others]
    return "; ".join([f"one thread of {usual}", *listed])


def parts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what is written into the page: where it was measured, a table per mode and number, and what failed."""
    sizes = {(row["draw"], row["edits"]) for row in rows}
    shown = reported([*(row for row in compared() if (row["draw"], row["edits"]) in sizes), *rows])
    dates, draws = (" and ".join(sorted({str(row[key]) for row in shown if key in row})) for key in ("date", "draw"))
    commits = {f"{EDITORS[row['editor']].project} at commit {row['commit']}" for row in shown if "commit" in row}
    lines = [f"Measured on {dates} on {machines(shown)}; draw {draws}; {' and '.join(sorted(commits))}."]
    given = {EDITORS[row["editor"]].label: row["set"] for row in shown if row.get("set")}
    if given:
        listed = (
            f"{label} {', '.join(f'`{key}={value}`' for key, value in own.items())}" for label, own in given.items()
        )
        lines.append(f"Changed with `--set`: {'; '.join(listed)}.")
    finished = [row for row in shown if "error" not in row]
    for mode, title in TITLES.items():
        for count in sorted({row["edits"] for row in finished}):
            if own := [row for row in finished if row["edits"] == count and EDITORS[row["editor"]].mode == mode]:
                lines += [f"### {title.format(n=count)}", table(own)]
    failed = [row for row in shown if "error" in row]
    return [*lines, *(f"{EDITORS[row['editor']].label} does not run: `{row['error']}`." for row in failed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, help="folders with EasyEdit and LocFT")
    parser.add_argument("--editors", nargs="+", choices=list(EDITORS), default=list(EDITORS))
    parser.add_argument("--draws", type=int, nargs="+", default=[10])
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], help="a hyperparameter of the editor: v_lr=0.1")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--deltas", type=Path, default=DELTAS, help="folder for the edited models")
    options = parser.parse_args()
    options.set = {key: ast.literal_eval(value) for key, _, value in (one.partition("=") for one in options.set)}
    checkouts = {}
    for folder in options.checkouts:
        if (project := project_of(folder)) is None:
            print(f"peers: {folder} is skipped: it holds neither EasyEdit nor LocFT", flush=True)
        else:
            checkouts[project] = folder.resolve()
    torch.set_num_threads(1)
    run(options, checkouts)
    if (rows := read_rows(options.results)) and PAGE.exists():
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), MARKS, parts(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
