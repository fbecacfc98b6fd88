"""Run recipes on SmolLM2 (make smollm2) with facts from CounterFact, and print one row per recipe.

    python tests/benchmarks/smollm2.py --recipes second_order,ft_m --draws 7
    python tests/benchmarks/smollm2.py --recipes ft_m --draws 100 --set=--model.learning_rate=2e-3   # choose settings

Each draw shuffles CounterFact with its own seed: the first records are edited, 100 others must keep their answers, and
3,000 others (--statements) give texts that must stay, together with 300 passages of Wikipedia. Settings are chosen on
draws from 100 upwards, and the other draws are reported. Results are appended to a file as lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import SHARED, Method, Setting, load
from workload import COUNTERFACT

from kedit_train import EditDataset, Probe
from kedit_train.cli import recipe
from kedit_train.data import Edit
from kedit_train.evaluation import EvaluationOptions, evaluate

SMOLLM2 = Path(__file__).resolve().parents[2] / ".models" / "smollm2"
WIKITEXT = SHARED / "data" / "text" / "wikitext-2.valid.txt"
OTHERS, STATEMENTS, PASSAGES, PROSE = 100, 3000, 300, 24


def passages() -> list[str]:
    """Return the long lines of the file, at most 60 words each, without the marks of its tokenization."""
    marks = {" <unk>": "", " @-@ ": "-", " @,@ ": ",", " @.@ ": ".", " ,": ",", " .": "."}
    texts = []
    for line in WIKITEXT.read_text(encoding="utf-8").splitlines():
        for mark, plain in marks.items():
            line = line.replace(mark, plain)
        if len(line) > 300:
            texts.append(" ".join(line.split()[:60]))
    return texts


def draw_of(seed: int, count: int, stated: int = STATEMENTS) -> tuple[list[Edit], Setting]:
    """Return the edits of a draw, with the other facts as locality prompts of the kind "others"."""
    records = list(EditDataset.load(COUNTERFACT))
    random.Random(seed).shuffle(records)
    edits, others, statements = records[:count], records[600 : 600 + OTHERS], records[1000 : 1000 + stated]
    probes = [Probe(other.prompt, (other.old_target or "",)) for other in others]
    edits = [
        replace(edit, locality={**edit.locality, "others": tuple(probes[i::count])}) for i, edit in enumerate(edits)
    ]
    prose = passages()
    texts = [f"{s.prompt} {s.old_target}." for s in statements] + prose[PROSE : PROSE + PASSAGES]
    setting = Setting("smollm2", SMOLLM2, 25, lambda n, d: edits, lambda e: texts, lambda: prose[:PROSE], lambda e: [])
    return edits, setting


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one recipe on one draw, and return its scores and its processor time."""
    edits, setting = draw_of(seed, options.edits, options.statements)
    model, tokenizer = load(SMOLLM2)
    evaluation = EvaluationOptions(prose=setting.unrelated(), batch_size=25)
    unedited = evaluate(model, tokenizer, edits, options=evaluation)
    config = recipe.load(name, *options.set)
    train = Method(setting, model, tokenizer, name, config, edits, "batch")
    began = time.process_time()
    train(model, edits)
    seconds = time.process_time() - began
    report = evaluate(model, tokenizer, edits, options=evaluation, unedited=unedited)

    def row(one: Any) -> dict[str, Any]:
        scores, locality = one.metrics, one.metrics["locality"]["by_kind"]
        neighbors = next(kind for kind in locality if kind != "others")
        return {
            "reliability": scores["reliability"]["generated"].value,
            "generality": scores["generality"]["generated"].value,
            "PS": scores["generality"]["probability"].value,
            "NS": locality[neighbors]["probability"].value,
            "others": locality["others"]["generated"].value,
            "neighbors": locality[neighbors]["generated"].value,
            "KL": scores["prose"].get("kl", scores["perplexity"]).value,
            "perplexity": scores["perplexity"].value,
        }

    before = {f"{key}, unedited": value for key, value in row(unedited).items() if key in ("NS", "PS", "perplexity")}
    protocol = report.meta["settings"]["protocol"]
    run = {"recipe": name, "draw": seed, "statements": options.statements}
    return {**run, **row(report), **before, "seconds": seconds, "protocol": protocol}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="ft_m,second_order")
    parser.add_argument("--draws", default="7", help="seeds: %(default)s")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--statements", type=int, default=STATEMENTS, help="texts that must stay: %(default)s")
    parser.add_argument("--set", action="append", default=[], help="a key of the recipes: --set=--model.dtype=auto")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("smollm2.jsonl"))
    options = parser.parse_args()
    if not SMOLLM2.exists():
        parser.error(f"the model is not at {SMOLLM2}; create it with: make smollm2")
    torch.set_num_threads(1)
    for name in options.recipes.split(","):
        for seed in map(int, options.draws.split(",")):
            result = measure(name, seed, options) | ({"set": options.set} if options.set else {})
            with options.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}), flush=True)


if __name__ == "__main__":
    main()
