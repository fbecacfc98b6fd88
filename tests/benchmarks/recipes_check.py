"""Run every recipe as a user does, and compare its scores with the line "# Expected: ..." in its header.

    python tests/benchmarks/recipes_check.py                           # all recipes, seeds 0 and 1
    python tests/benchmarks/recipes_check.py --only overtone chat --seeds 13
    python tests/benchmarks/recipes_check.py --write                   # measure and write the lines

The scores are those of 24 edits of the bundled world, for generated answers. --write takes the smallest and the
largest score over the seeds and adds their distance, at least 0.05, on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SCORES = ("reliability", "generality", "locality")
BOUND = re.compile(r"(reliability|generality|locality) (\d\.\d\d) to (\d\.\d\d)")
MARK = "Expected: "
MARGIN = 0.05


def runnable() -> list[str]:
    """Return the recipes whose header has a line with expected scores."""
    return [
        path.name for path in sorted(RECIPES.glob("*.*")) if path.suffix in (".yaml", ".py") and MARK in _head(path)
    ]


def _head(path: Path) -> str:
    return path.read_text().split("seed_everything", 1)[0][:3000]


def expected_scores(name: str) -> dict[str, tuple[float, float]]:
    """Return score -> (lower bound, upper bound) from the header of a recipe."""
    line = next(line for line in _head(RECIPES / name).splitlines() if MARK in line)
    return {score: (float(low), float(high)) for score, low, high in BOUND.findall(line)}


def run(name: str, seed: int, folder: Path) -> tuple[dict[str, float], float]:
    """Run a recipe in a process of its own and return its scores and its seconds."""
    out = folder / f"{name}-{seed}"
    report = out / "report.json"
    if name.endswith(".py"):
        command = [sys.executable, str(RECIPES / name), "--output_dir", str(out), "--seed", str(seed)]
    else:
        command = [sys.executable, "-m", "kedit_train", "fit", "--config", str(RECIPES / name)]
        command += [f"--seed_everything={seed}", f"--trainer.default_root_dir={out}"]
        command += [f"--trainer.callbacks.report_path={report}"]
    began = time.perf_counter()
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(report.read_text())["metrics"]
    return {score: found[score]["generated"]["value"] for score in SCORES}, time.perf_counter() - began


def failures(name: str, scores: dict[str, float]) -> list[str]:
    return [
        f"{score} is {scores[score]:.3f}, expected {low:.2f} to {high:.2f}"
        for score, (low, high) in expected_scores(name).items()
        if not low - 0.005 <= scores[score] <= high + 0.005
    ]


def write(name: str, runs: list[dict[str, float]], seconds: list[float]) -> None:
    """Write measured scores into the header of a recipe."""
    bounds = []
    for score in SCORES:
        low, high = (pick(run[score] for run in runs) for pick in (min, max))
        margin = max(MARGIN, high - low)
        bounds.append(f"{score} {max(0.0, low - margin):.2f} to {min(1.0, high + margin):.2f}")
    path = RECIPES / name
    text = path.read_text()
    mark = "# " if path.suffix == ".yaml" else ""
    line = f"{mark}{MARK}{', '.join(bounds)}; {sorted(seconds)[len(seconds) // 2]:.0f} s ({date.today()})."
    text, count = re.subn(rf"^{mark}(EXPECT|{MARK}.*)$", line, text, count=1, flags=re.MULTILINE)
    if not count:
        raise SystemExit(f"{path} has no line that starts with {mark}{MARK!r}")
    path.write_text(text)


def seeds(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of recipes, for example: overtone chat")
    parser.add_argument("--seeds", type=seeds, default="0,1", help="one or more seeds: 0,1,2 (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time (default: %(default)s)"
    )
    parser.add_argument("--write", action="store_true", help="write the expected scores instead of checking them")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs must be >= 1, got {options.jobs}")
    # These recipes train a value function, and edits that need a pretrained model.
    others = ("representation_control", "subject_tokens", "subject_values")
    edited = [path.name for path in sorted(RECIPES.glob("*.yaml")) if path.stem not in others]
    every = [*edited, "lora_sft.py", "one_by_one.py"] if options.write else runnable()
    names = [name for name in every if not options.only or Path(name).stem in options.only]
    if unknown := set(options.only or ()) - {Path(name).stem for name in every}:
        raise SystemExit(f"--only {min(unknown)}: no such recipe; choose from {' '.join(Path(n).stem for n in every)}")
    for name in names:
        if not re.search(rf"^(# )?(EXPECT|{MARK})", _head(RECIPES / name), re.MULTILINE):
            raise SystemExit(f"{RECIPES / name} has no line '# EXPECT' to write the scores to")
    found: dict[str, list[tuple[dict[str, float], float]]] = {name: [] for name in names}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=Console(stderr=True)) as bar,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        task = bar.add_task("recipes", total=len(names) * len(options.seeds))
        jobs = {pool.submit(run, name, seed, Path(folder)): name for name in names for seed in options.seeds}
        for job in as_completed(jobs):
            found[jobs[job]].append(job.result())
            bar.advance(task)
    table = Table("recipe", *SCORES, "seconds", "result")
    failed = False
    for name, runs in found.items():
        if options.write:
            write(name, [scores for scores, _ in runs], [seconds for _, seconds in runs])
        wrong = [text for scores, _ in runs for text in failures(name, scores)]
        failed |= bool(wrong)
        cells = [" ".join(f"{scores[score]:.2f}" for scores, _ in runs) for score in SCORES]
        seconds = " ".join(f"{seconds:.0f}" for _, seconds in runs)
        table.add_row(name, *cells, seconds, "; ".join(wrong) or "pass", style="red" if wrong else None)
    Console().print(table)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
