"""Control SmolLM2 by a value function on its hidden states: short answers, and facts without a change of weights.

    python tests/benchmarks/representation_control.py                    # both parts, into docs/results.md
    python tests/benchmarks/representation_control.py choose preference  # scores on the prompts for settings
    python tests/benchmarks/representation_control.py choose facts
    python tests/benchmarks/representation_control.py report             # write the tables only

*preference*: the reward is 1 for an answer without words, and falls to 0 for 40 words. The value function is trained on
144 sampled answers to 72 instructions. It is evaluated on 30 instructions with the same tasks and other topics, and on
30 instructions with other tasks and other topics.

*facts*: the reward is 1 for the new fact, -1 for the old fact, and 1 for the right answer to a prompt about another
subject. The value function is trained on given answers. The same facts are edited with the recipe kedit_default.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from compare_report import PAGE, replaced
from result_rows import add_measurement, read_rows
from settings import SMOLLM2
from smollm2_chat import TASKS, TEXT_TASKS, TEXT_TOPICS, TOPICS

from kedit_train import ChatFormat, Edit, EditDataset, generate_answers
from kedit_train.cli import recipe
from kedit_train.control import FactReward, ResponseDataModule, SamplingOptions, ShortAnswer, ValueModule, controlled
from kedit_train.data.leaks import contains_words
from kedit_train.data.prompts import pair_ids
from kedit_train.data.tokenization import collate, pad_token_id
from kedit_train.data.visible import fold
from kedit_train.modes import TrainLoop

RESULTS = Path(__file__).with_name("representation_control.jsonl")
FACTS = Path(__file__).resolve().parents[2] / "recipes" / "smollm2"
TRAINED = [task.format(topic) for topic in TEXT_TOPICS[:12] for task in TEXT_TASKS]
CHOSEN_ON = [task.format(topic) for topic in TEXT_TOPICS[12:14] for task in TEXT_TASKS]
REPORTED = {
    "same tasks": [task.format(topic) for topic in TOPICS[:5] for task in TEXT_TASKS],
    "other tasks": [task.format(topic) for topic in TOPICS[:6] for task in TASKS],
}
SHORT = ShortAnswer(40)
BRIEF = ChatFormat(system="Answer in one short sentence.")
# Chosen on other prompts and on other facts than those that are reported. With this step size, every change is as long
# as the trust region allows.
PREFERENCE = {"layers": [15], "step_size": 1e6, "radius": 0.4}
FACT = {"layers": [15], "step_size": 1e6, "radius": 0.2, "first_token": True}


class Counted:
    """Generate greedy answers, and measure the processor time."""

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options

    def __call__(self, prompts: list[str], **options: Any) -> tuple[list[str], float]:
        """Return the answers, and the number of generated tokens per second of processor time."""
        began = time.process_time()
        answers = generate_answers(self.model, self.tokenizer, prompts, stops=(), **(self.options | options))
        seconds = time.process_time() - began
        return [a.text for a in answers], sum(len(a.ids) + a.ended for a in answers) / seconds


def train_value(data: ResponseDataModule, *, layers: list[int], epochs: int, seed: int) -> tuple[ValueModule, float]:
    """Return the trained module, and the processor seconds of sampling, reading and training."""
    L.seed_everything(seed, verbose=False)
    began = time.process_time()
    module = ValueModule(str(SMOLLM2), layers=layers, width=256)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    return module, time.process_time() - began


@torch.no_grad()
def surprise(model: Any, tokenizer: Any, prompts: list[str], answers: list[str]) -> float:
    """Return the mean negative log-probability of the tokens of answers under the uncontrolled model, in nats."""
    total, count = 0.0, 0
    rows = [pair_ids(tokenizer, p, a, "chat") for p, a in zip(prompts, answers, strict=True) if a]
    for start in range(0, len(rows), 5):
        batch = collate(rows[start : start + 5], pad_id=pad_token_id(tokenizer))
        labels = batch.pop("labels")[:, 1:]
        log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
        found = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
        total, count = total - float(found.sum()), count + len(found)
    return total / max(1, count)


def preference(
    seed: int, prompt_sets: dict[str, list[str]], variants: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Train a value function for short answers. Return one row for each way to generate answers."""
    sampling = SamplingOptions(samples=2, max_new_tokens=48, batch_size=48, seed=seed)
    data = ResponseDataModule(TRAINED, reward=SHORT, sampling=sampling, prompt_format="chat", batch_size=16)
    layers = sorted({layer for variant in variants.values() for layer in variant["layers"]})
    module, seconds = train_value(data, layers=layers, epochs=8, seed=seed)
    model, tokenizer = module.language_model, module.tokenizer
    ask = Counted(model, tokenizer, prompt_format="chat", max_new_tokens=48, batch_size=25)

    def measure(name: str, method: str, control: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
        prompts = prompt_sets[name]
        with nullcontext() if control is None else controlled(model, module.value, **control):
            answers, speed = ask(prompts, **options)
        rewards = SHORT(prompts=prompts, completions=answers)
        return {
            "part": "preference", "prompts": name, "method": method, "seed": seed,
            "reward": sum(rewards) / len(rewards),
            "words": sum(len(a.split()) for a in answers) / len(answers),
            "surprise": surprise(model, tokenizer, prompts, answers), "tokens per second": speed,
            "seconds": 0.0 if control is None else seconds, "control": control, "answers": answers[:6],
        }  # fmt: skip

    for name in prompt_sets:
        yield measure(name, "plain", None)
        for method, control in variants.items():
            yield measure(name, method, control)
        yield measure(name, "system prompt", None, prompt_format=BRIEF)


def facts(first: int) -> list[Edit]:
    """Return 10 of the facts. The last neighbor and the rephrases of each fact are only evaluated."""
    return list(EditDataset.load(FACTS / "facts.jsonl"))[first : first + 10]


def given_responses(edits: list[Edit]) -> list[dict[str, str]]:
    """Return right and wrong answers to the prompts of the edits and to all but one of their neighbors."""
    records = []
    for edit in edits:
        records += [{"prompt": edit.prompt, "response": str(text)} for text in (edit.target, edit.old_target)]
        for probe in edit.locality["neighbors"][:-1]:
            records += [{"prompt": probe.prompt, "response": text} for text in (probe.answers[0], edit.target)]
    return records


def weight_edit(model: Any, tokenizer: Any, edits: list[Edit]) -> float:
    """Edit the model with the recipe kedit_default, and return the processor seconds."""
    # ValueModule has frozen the model.
    model.requires_grad_(True)
    config = recipe.load("kedit_default")
    callbacks = [c for c in recipe.callbacks(config) if type(c).__name__ != "EditMetrics"]
    for callback in callbacks:
        if hasattr(callback, "texts"):
            callback.texts = replace(callback.texts, source=str(FACTS / "keep.txt"))
    loop = TrainLoop(
        tokenizer, callbacks=callbacks, epochs=config.trainer.max_epochs, batch_size=10, learning_rate=1e-3,
        stop_loss=0.0,
    )  # fmt: skip
    began = time.process_time()
    loop(model, edits)
    return time.process_time() - began


def states(answers: list[str], wanted: list[tuple[str, ...]]) -> float:
    """Return the fraction of the answers that contain one of the wanted texts as whole words."""
    found = [any(contains_words(fold(a), fold(w)) for w in ws) for a, ws in zip(answers, wanted, strict=True)]
    return sum(found) / len(found)


def fact_rows(first: int, variants: dict[str, dict[str, Any]], *, weights: bool) -> Iterator[dict[str, Any]]:
    """Edit 10 facts by control and by weights. Return one row per method."""
    edits = facts(first)
    data = ResponseDataModule(given_responses(edits), reward=FactReward(edits), validation=0.0, batch_size=20)
    layers = sorted({layer for variant in variants.values() for layer in variant["layers"]})
    module, seconds = train_value(data, layers=layers, epochs=60, seed=0)
    model, tokenizer = module.language_model, module.tokenizer
    ask = Counted(model, tokenizer, max_new_tokens=8, batch_size=10)
    rephrases = [(prompt, edit.answers) for edit in edits for prompt in edit.rephrases]
    others = [edit.locality["neighbors"][-1].prompt for edit in edits]
    kept, _ = ask(others)

    def measure(method: str, control: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        with nullcontext() if control is None else controlled(model, module.value, **control):
            asked, _ = ask([edit.prompt for edit in edits])
            reworded, speed = ask([prompt for prompt, _ in rephrases])
            neighbors, _ = ask(others)
        return {
            "part": "facts", "method": method, "first": first, "new fact": states(asked, [e.answers for e in edits]),
            "rephrased": states(reworded, [answers for _, answers in rephrases]),
            "neighbors kept": sum(a == b for a, b in zip(neighbors, kept, strict=True)) / len(kept),
            "seconds": seconds, "tokens per second": speed, "control": control, "answers": asked,
        }  # fmt: skip

    yield measure("unedited", None, 0.0)
    for name, control in variants.items():
        yield measure(name, control, seconds)
    if weights:
        yield measure("kedit_default", None, weight_edit(model, tokenizer, edits))


COLUMNS = {
    "preference": (("reward", 2), ("words", 1), ("surprise", 2), ("tokens per second", 0), ("seconds", 0)),
    "facts": (("new fact", 2), ("rephrased", 2), ("neighbors kept", 2), ("tokens per second", 0), ("seconds", 0)),
}
HEADINGS = {
    "preference": ("reward", "words", "surprise", "tokens per second", "training, CPU s"),
    "facts": ("new fact", "rephrased", "neighbors kept", "tokens per second", "training, CPU s"),
}
METHODS = {
    "plain": "greedy answers", "unedited": "unedited model", "control": "`controlled`",
    "system prompt": "system prompt, no control", "kedit_default": "`kedit_default`, weights",
}  # fmt: skip


def table(part: str, rows: list[dict[str, Any]], name: str | None = None) -> str:
    """Return the rows of a part, or of one set of prompts, as a table in Markdown."""
    lines = [f"| {' | '.join([name or '10 facts', *HEADINGS[part]])} |", "|---|" + "---:|" * len(COLUMNS[part])]
    for method, label in METHODS.items():
        for row in rows:
            if row["method"] == method and row["part"] == part and row.get("prompts") == name:
                cells = (f"{row[key]:.{digits}f}" for key, digits in COLUMNS[part])
                lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(part: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the tables of a part: for the preference, one for each set of prompts."""
    return [table(part, rows, name) for name in (REPORTED if part == "preference" else (None,))]


def report() -> None:
    """Write the tables into docs/results.md."""
    rows, text = read_rows(RESULTS), PAGE.read_text()
    for part in COLUMNS:
        if any(row["part"] == part for row in rows):
            marks = f"<!-- control, {part}: written by representation_control.py -->", f"<!-- control, {part}: end -->"
            text = replaced(text, marks, tables(part, rows))
    PAGE.write_text(text)


def choices(control: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that were compared."""
    return {
        f"{layer} {radius}": control | {"layers": [layer], "radius": radius}
        for layer in (15, 20)
        for radius in (0.2, 0.3, 0.4, 0.5)
    }


def measured(part: str, *, choose: bool, prompts: list[str]) -> Iterator[dict[str, Any]]:
    """Run one part, on the prompts or facts on which settings are chosen or on those that are reported."""
    if part == "facts":
        first, variants = (10, choices(FACT)) if choose else (0, {"control": FACT})
        yield from fact_rows(first, variants, weights=not choose)
    elif choose:
        yield from preference(100, {"for settings": CHOSEN_ON}, choices(PREFERENCE))
    else:
        yield from preference(0, {name: REPORTED[name] for name in prompts}, {"control": PREFERENCE})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "choose", "report"], default="run")
    parser.add_argument("part", nargs="?", choices=list(COLUMNS), help="one part (default: both)")
    parser.add_argument("--prompts", nargs="+", choices=list(REPORTED), default=list(REPORTED), help="of preference")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in COLUMNS if options.what != "report" else ():
        if options.part not in (None, part):
            continue
        for row in measured(part, choose=options.what == "choose", prompts=options.prompts):
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if options.what == "run":
                add_measurement(RESULTS, row)
    if options.what != "choose":
        report()


if __name__ == "__main__":
    main()
