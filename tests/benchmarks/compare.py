"""Compare recipes on the same edits: single, in one batch, in sequence; on the world, factlm and SmolLM2; three draws.

    python tests/benchmarks/compare.py                                     # everything, into docs/results.md
    python tests/benchmarks/compare.py --model world --recipes ft_m,overtone --modes batch --draws 0
    python tests/benchmarks/compare.py tune --model smollm2 --recipes ft_m --edits 15 --texts 300
    python tests/benchmarks/compare.py report                              # write tables and plot from compare.jsonl

tune tries learning rates on edits of a held-out draw. Each recipe runs in a process of its own, so that its peak memory
can be read; --jobs processes run at the same time. Results are appended to compare.jsonl as they arrive, and what the
file holds is not measured again. Delete the lines of a recipe that has changed, or start anew with --results FILE;
docs/results.md is then written from that file. SmolLM2 (make smollm2) takes minutes to an hour per run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import RECIPES, TEXTS, Method, judged, load_recipe, modes_of, recipes_of
from paired import processor, resident_peak
from settings import HELD_OUT, SETTINGS, Setting, load, missing
from torch import nn

from kedit_train.data import Edit
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, Report
from kedit_train.modes import run_edits

# Mode -> number of edits per model. The bundled world has no more than 200 subjects.
EDITS: dict[str, dict[str, int]] = {
    "batch": {"world": 100, "factlm": 100, "smollm2": 50, "smollm2_zsre": 50},
    "single": {"world": 30, "factlm": 30, "smollm2": 20},
    "sequential": {"world": 200, "factlm": 300, "smollm2": 50},
}
DRAWS: dict[str, list[int]] = {"smollm2": [10, 11, 12], "smollm2_zsre": [10]}
SCORES = ("reliability", "generality", "portability", "locality")
RATES, TOY_RATES = {"smollm2": [5e-4, 2e-3, 5e-3]}, [3e-4, 1e-3, 3e-3, 1e-2]
RESULTS = Path(__file__).with_name("compare.jsonl")


def measure(
    setting: Setting, name: str, mode: str, draw: int, count: int, given: Sequence[str] = (), few: int | None = None
) -> dict[str, Any]:
    """Run one recipe in one mode and return its scores and its cost."""
    model, tokenizer = load(setting.path)
    edits = setting.edits(count)
    own = load_recipe(name, *given, model=setting.name)
    train = Method(setting, model, tokenizer, name, own, edits, mode, few)
    spent = 0.0

    def timed(model: Any, edits: Sequence[Edit]) -> None:
        nonlocal spent
        began = time.process_time()
        train(model, edits)
        spent += time.process_time() - began

    texts = setting.unrelated() if mode != "single" else None
    options = EvaluationOptions(metrics=setting.metrics, max_new_tokens=16, prose=texts)
    how: Any = mode
    result = run_edits(
        model, tokenizer, edits, mode=how, train=timed, checkpoints=(), options=options, seed=draw, progress=False
    )
    report = result.checkpoints[-1].report
    found: dict[str, Any] = {name: report.metrics[name]["generated"].value for name in SCORES}
    # Share of rephrased prompts where the old answer is more likely than the new one.
    older = report.metrics["resurgence"]["prefers_old"] if setting.metrics else {}
    found["resurgence"] = older["rephrase"].value if older else None
    found["drift"] = None if mode == "single" else drift(model, load(setting.path)[0])
    found["perplexity"] = report.metrics["perplexity"].value
    found["perplexity before"] = result.unedited.metrics["perplexity"].value
    found["seconds"] = spent / len(edits)
    return found | (completions(report, result.unedited) if report.protocols.headline == "leading" else {})


def completions(report: Report, unedited: Report) -> dict[str, Any]:
    """Return further scores of a model that does not end its answers."""

    def kept(one: Report) -> tuple[Any, Any]:
        kinds = one.metrics["locality"]["by_kind"]
        return kinds["others"], next(kinds[kind] for kind in kinds if kind != "others")

    def probabilities(one: Report) -> dict[str, Any]:
        return {"PS": one.metrics["generality"]["probability"].value, "NS": kept(one)[1]["probability"].value}

    others, neighbors = kept(report)
    return {
        **probabilities(report),
        **{f"{name} before": value for name, value in probabilities(unedited).items()},
        "others": others["generated"].value,
        "neighbors": neighbors["generated"].value,
        "KL": report.metrics["prose"]["kl"].value if report.metrics["prose"] else None,
        "protocol": str(report.protocols),
    }


def drift(model: nn.Module, base: nn.Module) -> float:
    """Return the norm of the change divided by the norm of the matrices that changed."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    moved = [(a - b, b) for a, b in pairs if not torch.equal(a, b)]
    changed, before = (sum(float(x.square().sum()) for x in each) ** 0.5 for each in zip(*moved, strict=True))
    return changed / before


def cell(options: argparse.Namespace) -> None:
    """Run one recipe on one model and print one line of JSON per run."""
    torch.set_num_threads(1)
    load(SETTINGS[options.model](0).path)
    start = resident_peak()
    for mode, draw, rate in itertools.product(options.modes, options.draws, options.rates or [None]):
        setting = SETTINGS[options.model](draw)
        if rate is not None:
            # No learning rate is chosen by the perplexity.
            setting = replace(setting, unrelated=lambda: None)
        key = {"model": options.model, "recipe": options.recipes[0], "mode": mode, "draw": draw}
        key |= {} if rate is None else {"rate": rate}
        count = options.edits or EDITS[mode][options.model]
        given = [*options.set, *([] if rate is None else [f"--model.learning_rate={rate}"])]
        try:
            found = measure(setting, key["recipe"], mode, draw, count, given, options.texts)
        except EditError as error:
            found = {"error": str(error)}
        found |= {
            "edits": count,
            "machine": processor(),
            "memory": (resident_peak() - start) / 1e6 if mode == "batch" else None,
        }
        read = options.texts or TEXTS.get(options.model, {}).get(key["recipe"])
        found |= {name: value for name, value in (("texts", read), ("set", options.set)) if value}
        print(json.dumps(key | found), flush=True)


def done(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, list[str], list[int]]]:
    """Yield what is not measured yet: model, recipe, modes and draws."""
    have = {(r["model"], r["recipe"], r["mode"], r["draw"]) for r in done(options.results)}
    for model in options.models:
        for name in options.recipes or recipes_of(model):
            for mode in modes_of(model, name, options.modes):
                draws = [d for d in options.draws or DRAWS.get(model, [0, 1, 2]) if (model, name, mode, d) not in have]
                if draws:
                    yield model, name, [mode], draws


def run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    todo = list(cells(options))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(options.jobs) as pool:
        task = bar.add_task("comparing", total=sum(len(modes) * len(draws) for *_, modes, draws in todo))
        running = {pool.submit(_worker, options, *one): one for one in todo}
        for future in as_completed(running):
            model, name, modes, draws = running[future]
            rows = future.result()
            with options.results.open("a") as file:
                file.writelines(f"{row}\n" for row in rows)
            bar.update(task, advance=len(modes) * len(draws), description=f"{model}: {name}, {modes[0]}")
            for row in map(json.loads, rows):
                bar.console.print(_line(row), highlight=False)


def _worker(
    options: argparse.Namespace, model: str, name: str, modes: list[str], draws: list[int], rates: Sequence[float] = ()
) -> list[str]:
    command = [sys.executable, __file__, "cell", "--model", model, "--recipes", name, "--modes", ",".join(modes)]
    command += ["--draws", ",".join(map(str, draws)), *(f"--set={one}" for one in options.set)]
    command += ["--edits", str(options.edits)] if options.edits else []
    command += ["--texts", str(options.texts)] if options.texts else []
    command += ["--rates", ",".join(map(str, rates))]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    found = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stderr[-3000:]}")
    return [line for line in found.stdout.splitlines() if line.startswith("{")]


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['model']} {row['recipe']} {row['mode']} {row['draw']}: {row['error']}"
    shown = (*SCORES, *("PS", "NS", "others", "KL"))
    scores = " ".join(f"{k[:3]} {row[k]:.2f}" for k in shown if row.get(k) is not None)
    return f"{row['model']} {row['recipe']} {row['mode']} {row['draw']}: {scores}, {row['seconds']:.3f} s an edit"


def tune(options: argparse.Namespace) -> None:
    """Print the scores for each rate on the held-out draw, and the product of the scores that count."""
    modes = options.modes if len(options.modes) == 1 else ["batch"]
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(_worker, options, model, name, modes, [HELD_OUT], options.rates or RATES.get(model, TOY_RATES))
            for model in options.models
            for name in options.recipes or recipes_of(model)
        ]
        for job in as_completed(jobs):
            for row in map(json.loads, job.result()):
                value = math.prod(row.get(score) or 0.0 for score in judged(row["model"]))
                print(f"{value:.3f} at {row['rate']:g}: {_line(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "tune", "report", "cell"], default="run")
    parser.add_argument(
        "--model", dest="models", help=f"some of: {', '.join(SETTINGS)}; by default those that are here"
    )
    parser.add_argument("--recipes", default="", help=f"by default those of the model; some of: {', '.join(RECIPES)}")
    parser.add_argument("--modes", default=",".join(EDITS), help="some of: %(default)s")
    parser.add_argument("--draws", default="", help="which edits and seeds: 0,1,2, or 10,11,12 on SmolLM2")
    parser.add_argument("--rates", default="", help="for tune: learning rates to try")
    parser.add_argument("--edits", type=int, help="how many, instead of each mode's own")
    parser.add_argument("--texts", type=int, help="how many texts, instead of those of methods.py")
    parser.add_argument("--set", action="append", default=[], help="a key of the recipes: --set=--model.dtype=auto")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    absent = {name: path for name in SETTINGS if (path := missing(name))}
    here = [name for name in SETTINGS if name not in absent]
    if options.models is None and options.what != "report":
        for name, path in absent.items():
            print(f"{name} is left out, because {path} does not exist", file=sys.stderr)
    options.models = options.models or ",".join(here)
    for name, kind in (("models", str), ("recipes", str), ("modes", str), ("draws", int), ("rates", float)):
        setattr(options, name, [kind(one) for one in getattr(options, name).split(",") if one])
    for name in options.models:
        if name not in here:
            parser.error(f"--model {name}: here is {', '.join(here)} (looked for {absent.get(name, 'no such model')})")
    options.model = options.models[0]
    if options.what == "cell":
        cell(options)
    elif options.what == "tune":
        tune(options)
    else:
        if options.what == "run":
            run(options)
        from compare_report import write

        write(done(options.results))


if __name__ == "__main__":
    main()
