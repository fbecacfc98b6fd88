"""Fine-tune SmolLM2 on two small instruction sets, one after the other, and measure what it keeps of the first one.

    python tests/benchmarks/instruction_sets.py                     # seeds 0 and 1, into docs/results.md
    python tests/benchmarks/instruction_sets.py --seeds 100         # the seed on which settings are chosen
    python tests/benchmarks/instruction_sets.py --only plain --seeds 100 --set rate=2e-4
    python tests/benchmarks/instruction_sets.py report              # write the table only

Both sets ask about sentences such as "Ada went from Oslo to Rome by train on Monday." Set A asks for one part of the
sentence, in square brackets. Set B asks for a line of a table, for a label, and for the day with the name. An answer
counts if it is exactly right, on sentences whose names and cities do not occur in training. Set A is trained once per
seed, without any callback that limits forgetting. Each method then trains set B, starting from this model.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compare_report import PAGE, replaced
from result_rows import add_measurement, read_rows
from settings import PROSE, SMOLLM2, half_passages, load
from torch import Tensor

from kedit_train import Edit, EditDataset, generate_answers
from kedit_train.callbacks import (
    BatchAnchor,
    ForgettingBudget,
    KLLocality,
    NullSpace,
    ParameterScope,
    PolyakStep,
    PrefixCache,
    TokenLoss,
)
from kedit_train.data.tokenization import collate, pad_token_id
from kedit_train.evaluation.scoring.prose import measure_prose, prose_scores
from kedit_train.modes import ExampleOptions, TrainLoop

RESULTS = Path(__file__).with_name("instruction_sets.jsonl")
TRAIN, TEST, BATCH, TEXTS = 48, 30, 16, 96
NAMES = (
    "Ada", "Ben", "Clara", "Dan", "Eva", "Felix", "Grace", "Hugo", "Iris", "Jack", "Karen", "Leo", "Mia", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
CITIES = (
    "Oslo", "Rome", "Paris", "Berlin", "Madrid", "Vienna", "Athens", "Dublin", "Prague", "Lisbon", "Warsaw", "Cairo",
    "Tokyo", "Delhi", "Boston", "Denver",
)  # fmt: skip
VEHICLES, DAYS = ("train", "bus", "car", "plane", "ship"), ("Monday", "Tuesday", "Thursday", "Friday", "Sunday")
SETS = {
    "A": {
        "Where does the journey begin?": "[from: {start}]",
        "Where does the journey end?": "[to: {end}]",
        "Who travels?": "[who: {who}]",
    },
    "B": {
        "Write the journey as a line of a table.": "| {who} | {start} | {end} | {day} |",
        "Write a label for the ticket.": "{day} / {vehicle} / {end}",
        "Which day is it, and who travels?": "{day}: {who}",
    },
}
# Chosen on seed 100.
SETTINGS = {"rate": 5e-4, "epochs": 10, "kl": 0.01, "batch_kl": 2.0, "weight": 20.0, "step_size": 0.05}
COLUMNS = (
    ("A before", 2), ("A", 2), ("B", 2), ("KL on B", 3), ("KL on prose", 4), ("seconds", 0)
)  # fmt: skip
HEADINGS = ("training on set B", "A before B", "A after B", "B after B", "KL on B", "KL on prose", "CPU s")
METHODS = {
    "plain": "plain fine-tuning",
    "texts": "`KLLocality` on prose, `ForgettingBudget`",
    "texts and A": "`KLLocality` on prose and answers of set A, `ForgettingBudget`",
    "fixed weight": "`KLLocality` on prose and answers of set A, fixed weight",
    "batch": "`BatchAnchor`, `ForgettingBudget`",
    "anchored SFT": 'anchored SFT: `TokenLoss("dft")`, `BatchAnchor`',
    "null space": "`NullSpace` on prose and answers of set A, `PolyakStep`",
}


def instructions(name: str, seed: int) -> tuple[list[Edit], list[Edit]]:
    """Return the training examples and the test examples of a set. They share no name and no city."""
    draw = random.Random(f"{name} {seed}")
    names, cities = draw.sample(NAMES, len(NAMES)), draw.sample(CITIES, len(CITIES))
    parts = ((names[:12], cities[:10], TRAIN), (names[12:], cities[10:], TEST))
    return tuple([_example(name, draw, n, c, i) for i in range(count)] for n, c, count in parts)  # type: ignore[return-value]


def _example(name: str, draw: random.Random, names: list[str], cities: list[str], number: int) -> Edit:
    start, end = draw.sample(cities, 2)
    words = {"who": draw.choice(names), "start": start, "end": end}
    words |= {"vehicle": draw.choice(VEHICLES), "day": draw.choice(DAYS)}
    sentence = "{who} went from {start} to {end} by {vehicle} on {day}.".format(**words)
    question, answer = list(SETS[name].items())[number % len(SETS[name])]
    return Edit(f"{sentence}\n{question}\nAnswer:", answer.format(**words), id=f"{name}-{number}")


class Bench:
    """SmolLM2, the two sets of a seed, and the texts on which predictions should stay the same."""

    def __init__(self, seed: int, settings: dict[str, float]) -> None:
        self.seed, self.settings = seed, settings
        self.model, self.tokenizer = load(SMOLLM2)
        self.sets = {name: instructions(name, seed) for name in SETS}
        prose = half_passages()
        self.prose, self.texts = prose[:PROSE], prose[PROSE : PROSE + TEXTS]

    def train(self, model: Any, name: str, callbacks: list[Any]) -> float:
        """Train a set and return the processor time in seconds."""
        torch.manual_seed(self.seed)
        scope = ParameterScope("0.5-0.8", modules="mlp.down_proj.weight")
        loop = TrainLoop(
            self.tokenizer,
            callbacks=[scope, PrefixCache(), *callbacks],
            epochs=int(self.settings["epochs"]),
            batch_size=BATCH,
            learning_rate=self.settings["rate"],
            stop_loss=0.0,
            examples=ExampleOptions(append_eos=True),
        )
        began = time.process_time()
        loop(model, self.sets[name][0])
        return time.process_time() - began

    def score(self, model: Any, name: str) -> float:
        """Return the fraction of the test examples whose answer is exactly right."""
        test = self.sets[name][1]
        answers = generate_answers(model, self.tokenizer, [e.prompt for e in test], max_new_tokens=20)
        return sum(a.text.strip() == e.target for a, e in zip(answers, test, strict=True)) / len(test)

    @torch.no_grad()
    def log_probs(self, model: Any, name: str) -> Tensor:
        """Return the log-probabilities of the next token at the answers of the test examples, [tokens, vocabulary]."""
        rows = EditDataset(self.sets[name][1]).encode(self.tokenizer, append_eos=True)
        batch = collate(rows, pad_id=pad_token_id(self.tokenizer))
        labels = batch.pop("labels")[:, 1:]
        return model(**batch).logits[:, :-1][labels != -100].log_softmax(-1)

    def callbacks(self, method: str) -> list[Any]:
        """Return the callbacks of a method, for training on set B."""
        of_a = [f"{e.prompt} {e.target}" for e in self.sets["A"][0]]
        # Alternating, so that each batch has texts of both kinds.
        both = [
            text for pair in zip(self.texts, of_a * (len(self.texts) // len(of_a) + 1), strict=False) for text in pair
        ]
        kl, batch_kl = self.settings["kl"], self.settings["batch_kl"]
        return {
            "plain": lambda: [TokenLoss("cross_entropy")],
            "texts": lambda: [TokenLoss("cross_entropy"), KLLocality(self.texts), ForgettingBudget(kl)],
            "texts and A": lambda: [TokenLoss("cross_entropy"), KLLocality(both), ForgettingBudget(kl)],
            "fixed weight": lambda: [TokenLoss("cross_entropy"), KLLocality(both, weight=self.settings["weight"])],
            "batch": lambda: [TokenLoss("cross_entropy"), BatchAnchor(), ForgettingBudget(batch_kl)],
            "anchored SFT": lambda: [TokenLoss("dft"), BatchAnchor(0.05)],
            "null space": lambda: [
                TokenLoss("cross_entropy"), NullSpace([*self.texts, *of_a], energy=0.9),
                PolyakStep(self.settings["step_size"]),
            ],
        }[method]()  # fmt: skip


def run(seed: int, methods: list[str], settings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Train set A, then set B with each method. Return one row per method."""
    bench = Bench(seed, settings)
    untrained = {name: bench.score(bench.model, name) for name in SETS}
    seconds = bench.train(bench.model, "A", [TokenLoss("cross_entropy")])
    first = bench.score(bench.model, "A")
    print(f"seed {seed}: untrained {untrained}, A after A {first:.2f} ({seconds:.0f} s)", flush=True)
    before = bench.log_probs(bench.model, "B")
    _, reference = measure_prose(bench.model, bench.tokenizer, bench.prose)
    for method in methods:
        model = copy.deepcopy(bench.model)
        seconds = bench.train(model, "B", bench.callbacks(method))
        now = bench.log_probs(model, "B")
        results, _ = measure_prose(model, bench.tokenizer, bench.prose, reference=reference)
        row = {
            "method": method, "seed": seed, "A before": first,
            "A": bench.score(model, "A"), "B": bench.score(model, "B"),
            "KL on B": float((before.exp() * (before - now)).sum(-1).mean()),
            "KL on prose": prose_scores(results)["kl"].value, "seconds": seconds, "settings": settings,
        }  # fmt: skip
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        yield row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table in Markdown, with the mean over the seeds of each method."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for method, label in METHODS.items():
        own = [row for row in rows if row["method"] == method and row["seed"] < 100]
        if own:
            cells = (f"{sum(row[key] for row in own) / len(own):.{digits}f}" for key, digits in COLUMNS)
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods (default: all)")
    parser.add_argument("--set", nargs="+", default=[], help=f"settings, such as rate=1e-4: {', '.join(SETTINGS)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = SETTINGS | {name: float(value) for name, _, value in (one.partition("=") for one in options.set)}
    for seed in options.seeds if options.what == "run" else ():
        for row in run(seed, options.only, settings):
            # Rows on which settings are chosen are not kept.
            if seed < 100:
                add_measurement(RESULTS, row)
    if rows := read_rows(RESULTS):
        marks = "<!-- instruction sets: written by instruction_sets.py -->", "<!-- instruction sets: end -->"
        PAGE.write_text(replaced(PAGE.read_text(), marks, ["\n".join(table(rows))]))


if __name__ == "__main__":
    main()
