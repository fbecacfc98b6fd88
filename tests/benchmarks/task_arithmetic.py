"""Add and subtract edits of SmolLM2: unlearn one of three edit sets by negation, with dense and low-rank changes.

    python tests/benchmarks/task_arithmetic.py               # seeds 0 and 1, into docs/results.md
    python tests/benchmarks/task_arithmetic.py --seeds 100
    python tests/benchmarks/task_arithmetic.py report        # write the tables only

The facts are about invented people and rivers. Set A gives the profession of each person. The *aligned* set gives the
same professions in other words. The *irrelevant* set says where rivers flow. The *contradictory* set has the prompts of
set A with other professions. First, one model is trained on A, the aligned and the irrelevant set together, and the
change of a model that was trained on A alone is subtracted from it. This repeats, with facts instead of passages of
books, the experiment with Phi-1.5 of "When is Task Vector Provably Effective for Model Editing?" (arXiv 2504.10957).
Then the change of A is added to the change of each of the other sets.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_report import PAGE, replaced
from result_rows import add_measurement, read_rows
from settings import PROSE, SMOLLM2, half_passages, load

from kedit_train import Edit, EditDelta, generate_answers
from kedit_train.callbacks import ParameterScope, PrefixCache, StopWhenEdited, TokenLoss
from kedit_train.evaluation.scoring.prose import measure_prose, prose_scores
from kedit_train.modes import TrainLoop

RESULTS = Path(__file__).with_name("task_arithmetic.jsonl")
FACTS, EPOCHS, LAYERS = 20, 40, "0.5-0.8"
SYLLABLES = ("ba", "do", "fe", "ga", "ki", "lo", "mi", "nu", "pe", "ra", "so", "ti", "vu", "za", "le", "mo")
PROFESSIONS = (
    "nurse", "farmer", "lawyer", "painter", "teacher", "pilot", "baker", "doctor", "singer", "butcher", "judge",
    "tailor",
)  # fmt: skip
COUNTRIES = (
    "France",
    "Spain",
    "Italy",
    "Poland",
    "Norway",
    "Turkey",
    "India",
    "Japan",
    "Brazil",
    "Peru",
    "Chile",
    "Egypt",
)
SETS = {
    "A": "{name} works as a",
    "aligned": "The profession of {name} is that of a",
    "irrelevant": "The river {name} flows through",
    "contradictory": "{name} works as a",
}
# Not tuned: these were the first rates that were tried, on seed 100.
RATES = {"dense": 5e-4, "LoRA": 1e-3}
COEFFICIENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
TRAINED_TOGETHER = ("A", "aligned", "irrelevant")
UNLEARNED, ADDED = "unlearned", "added"


def facts(seed: int) -> dict[str, list[Edit]]:
    """Return the four sets of a seed."""
    draw = random.Random(seed)
    names: list[str] = []
    while len(names) < 2 * FACTS:
        name = "".join(draw.sample(SYLLABLES, 3)).capitalize()
        if name not in names:
            names.append(name)
    people, rivers = names[:FACTS], names[FACTS:]
    jobs = [draw.choice(PROFESSIONS) for _ in people]
    targets = {
        "A": jobs,
        "aligned": jobs,
        "irrelevant": [draw.choice(COUNTRIES) for _ in rivers],
        "contradictory": [draw.choice([job for job in PROFESSIONS if job != own]) for own in jobs],
    }
    return {
        name: [
            Edit(prompt.format(name=subject), target, id=f"{name}-{i}")
            for i, (subject, target) in enumerate(
                zip(rivers if name == "irrelevant" else people, targets[name], strict=True)
            )
        ]
        for name, prompt in SETS.items()
    }


class Bench:
    """SmolLM2, the sets of a seed, and the changes that are trained on them."""

    def __init__(self, training: str, seed: int) -> None:
        self.training, self.seed, self.sets = training, seed, facts(seed)
        self.model, self.tokenizer = load(SMOLLM2)
        self.prose = half_passages()[:PROSE]
        _, self.reference = measure_prose(self.model, self.tokenizer, self.prose)
        self.seconds = 0.0

    def delta(self, *names: str) -> EditDelta:
        """Train the unedited model on sets, and return the change of its weights."""
        edits = [edit for name in names for edit in self.sets[name]]
        model: Any = copy.deepcopy(self.model)
        torch.manual_seed(self.seed)
        loop = TrainLoop(
            self.tokenizer,
            callbacks=[
                ParameterScope(LAYERS, modules="mlp.down_proj"), TokenLoss(), StopWhenEdited(loss=0.05), PrefixCache(),
            ],
            epochs=EPOCHS,
            batch_size=10,
            learning_rate=RATES[self.training],
            stop_loss=0.0,
        )  # fmt: skip
        began = time.process_time()
        if self.training == "LoRA":
            from peft import LoraConfig, get_peft_model

            adapted: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["down_proj"]))
            loop(adapted, edits)
            model = adapted.merge_and_unload()
        else:
            loop(model, edits)
        self.seconds += time.process_time() - began
        return EditDelta.between(self.model, model)

    def scores(self, vector: Any, names: Sequence[str]) -> dict[str, float]:
        """Return the fraction of right answers in each set, and the KL divergence on prose, with a change applied."""
        applied = vector.apply(self.model)
        try:
            scores = {}
            for name in names:
                edits = self.sets[name]
                answers = generate_answers(self.model, self.tokenizer, [e.prompt for e in edits], max_new_tokens=5)
                right = [a.text.strip().startswith(e.target) for a, e in zip(answers, edits, strict=True)]
                scores[name] = sum(right) / len(right)
            results, _ = measure_prose(self.model, self.tokenizer, self.prose, reference=self.reference)
            scores["KL"] = float(prose_scores(results)["kl"].value or 0.0)
        finally:
            applied.revert(self.model)
        return scores


def run(training: str, seed: int) -> Iterator[dict[str, Any]]:
    """Unlearn set A by negation, then add its change to that of each other set. Return one row per model."""
    bench = Bench(training, seed)
    about = {"training": training, "seed": seed}
    alone = {name: bench.delta(name).vector() for name in SETS}
    together = bench.delta(*TRAINED_TOGETHER).vector()
    for coefficient in COEFFICIENTS:
        scores = bench.scores(together + -coefficient * alone["A"], TRAINED_TOGETHER)
        yield {**about, "what": UNLEARNED, "coefficient": coefficient, **scores}
    for name in SETS:
        if name != "A":
            scores = bench.scores(alone["A"] + alone[name], ("A", name))
            own = bench.scores(alone[name], (name,))
            yield {
                **about, "what": ADDED, "other": name, "cosine": alone["A"].cosine(alone[name]), "A": scores["A"],
                "set": scores[name], "set alone": own[name], "KL": scores["KL"], "seconds": bench.seconds,
            }  # fmt: skip


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def unlearning_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table in Markdown with the means over the seeds, one row per coefficient."""
    lines = [
        "| training | coefficient | set A | aligned set | irrelevant set | KL on prose |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for training in RATES:
        for coefficient in COEFFICIENTS:
            own = [
                r
                for r in rows
                if (r["what"], r["training"]) == (UNLEARNED, training) and r["coefficient"] == coefficient
            ]
            if own:
                cells = [f"{mean(own, name):.2f}" for name in TRAINED_TOGETHER] + [f"{mean(own, 'KL'):.3f}"]
                lines.append(f"| {training} | {coefficient:g} | {' | '.join(cells)} |")
    return lines


def addition_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table in Markdown with the means over the seeds, one row per added set."""
    lines = [
        "| training | set A plus | cosine | set A | other set | other set alone | KL on prose |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for training in RATES:
        for name in SETS:
            own = [r for r in rows if (r["what"], r["training"]) == (ADDED, training) and r["other"] == name]
            if own:
                cells = [f"{mean(own, key):.2f}" for key in ("cosine", "A", "set", "set alone")]
                lines.append(f"| {training} | {name} | {' | '.join(cells)} | {mean(own, 'KL'):.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--training", nargs="+", choices=RATES, default=list(RATES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds if options.what == "run" else ():
        for training in options.training:
            for row in run(training, seed):
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                # Rows on which settings are chosen are not kept.
                if seed < 100:
                    add_measurement(RESULTS, row)
    if rows := read_rows(RESULTS):
        marks = "<!-- task arithmetic: written by task_arithmetic.py -->", "<!-- task arithmetic: end -->"
        tables = "\n".join([*unlearning_table(rows), "", *addition_table(rows)])
        PAGE.write_text(replaced(PAGE.read_text(), marks, [tables]))


if __name__ == "__main__":
    main()
