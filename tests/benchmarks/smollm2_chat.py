"""Edit SmolLM2-Instruct in chats (make smollm2), and print how it then answers the edits and 50 unrelated instructions.

    python tests/benchmarks/smollm2_chat.py
    python tests/benchmarks/smollm2_chat.py --set=--trainer.callbacks.SecondOrderLocality.step_size=0.05

The facts of ``recipes/smollm2/facts.jsonl`` are asked as questions, and the new answer is a sentence. Before training,
the unedited model answers 96 instructions. These conversations are the texts on which predictions should stay the same.
The 50 instructions of the evaluation have other tasks and other topics.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from settings import SMOLLM2, load

from kedit_train import Edit, EditDataset, Probe
from kedit_train.callbacks import EditCallback, EditMetrics, Texts
from kedit_train.cli import recipe
from kedit_train.evaluation import EvaluationOptions, evaluate, generate_answers
from kedit_train.modes import ExampleOptions, TrainLoop

FACTS = Path(__file__).resolve().parents[2] / "recipes" / "smollm2" / "facts.jsonl"
TEXT_TASKS = (
    "Explain {} to a child.", "Give me three facts about {}.", "Write a short story about {}.",
    "What is the most important thing to know about {}?", "List the advantages of {}.", "Who is {} useful for?",
)  # fmt: skip
TEXT_TOPICS = (
    "bicycles", "bread", "honey bees", "libraries", "solar panels", "chess", "rainbows", "tea", "volcanoes", "trains",
    "dictionaries", "vaccines", "photography", "mountains", "compost", "music lessons",
)  # fmt: skip
TASKS = (
    "Write a poem of four lines about {}.", "Summarize in one sentence why people like {}.",
    "Suggest a title for a book about {}.", "Describe {} in five words.", "How would you draw {}?",
)  # fmt: skip
TOPICS = (
    "the ocean", "winter", "old cars", "a garden", "dogs", "the night sky", "pancakes", "football", "friendship",
    "lighthouses",
)  # fmt: skip


def facts() -> list[Edit]:
    """Return the facts as questions whose answers are sentences. The new answer alone also counts as correct."""
    edits = []
    for fact in EditDataset.load(FACTS):
        asked = next(iter(fact.portability.values()))[0].prompt
        question = asked.removeprefix("Question: ").removesuffix("\nAnswer:")
        sentence = f"{fact.prompt} {fact.target}."
        edits.append(replace(fact, prompt=question, target=sentence, aliases=(fact.target,), portability={}))
    return edits


def with_instructions(edits: list[Edit], answers: dict[str, str]) -> list[Edit]:
    """Return the edits with the instructions as locality prompts, and with chat questions as rephrases."""
    probes = [Probe(prompt, (answer,)) for prompt, answer in answers.items()]
    return [
        replace(
            edit,
            rephrases=(f"I have a question. {edit.prompt}", f"{edit.prompt} Answer in one sentence."),
            locality={"instructions": tuple(probes[i :: len(edits)])},
        )
        for i, edit in enumerate(edits)
    ]


def callbacks_of(config: Any, conversations: list[Any]) -> list[EditCallback]:
    """Return the callbacks of the recipe, which read the conversations instead of the texts of the recipe."""
    callbacks = [callback for callback in recipe.callbacks(config) if not isinstance(callback, EditMetrics)]
    for callback in callbacks:
        if isinstance(texts := getattr(callback, "texts", None), Texts):
            callback.texts = replace(texts, source=conversations)
    return callbacks


def answers_of(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> dict[str, str]:
    answers = generate_answers(
        model, tokenizer, prompts, prompt_format="chat", max_new_tokens=max_new_tokens, batch_size=25, stops=()
    )
    return {prompt: answer.text for prompt, answer in zip(prompts, answers, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="chat")
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe: --set=--model.dtype=auto")
    parser.add_argument("--tokens", type=int, default=32, help="length of generated answers (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("smollm2_chat.jsonl"))
    options = parser.parse_args()
    if not SMOLLM2.exists():
        parser.error(f"the model is not at {SMOLLM2}; create it with: make smollm2")
    torch.set_num_threads(1)
    model, tokenizer = load(SMOLLM2)
    asked = [task.format(topic) for topic in TOPICS for task in TASKS]
    given = [task.format(topic) for topic in TEXT_TOPICS for task in TEXT_TASKS]
    conversations = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in answers_of(model, tokenizer, given, options.tokens).items()
    ]
    edits = with_instructions(facts(), answers_of(model, tokenizer, asked, options.tokens))
    evaluation = EvaluationOptions(
        prompt_format="chat", protocol="contains", max_new_tokens=options.tokens, batch_size=25, metrics=["kl"]
    )
    unedited = evaluate(model, tokenizer, edits, options=evaluation)
    config = recipe.load(options.recipe, *options.set)
    loop = TrainLoop(
        tokenizer,
        callbacks=callbacks_of(config, conversations),
        epochs=config.trainer.max_epochs,
        batch_size=20,
        learning_rate=config.model.init_args.learning_rate,
        stop_loss=0.0,
        examples=ExampleOptions(prompt_format="chat"),
    )
    began = time.process_time()
    loop(model, edits)
    seconds = time.process_time() - began
    report = evaluate(model, tokenizer, edits, options=evaluation, unedited=unedited)
    result: dict[str, Any] = {"recipe": options.recipe, "set": options.set, "seconds": seconds}
    for name, one in (("edited", report), ("unedited", unedited)):
        scores = one.metrics
        result[name] = {
            "contains the new fact": scores["reliability"]["generated"].value,
            "the same, other wordings": scores["generality"]["generated"].value,
        }
    result["locality"] = {
        key: mean.value for key, mean in report.metrics["locality"].items() if getattr(mean, "value", None) is not None
    }
    long = generate_answers(
        model, tokenizer, [e.prompt for e in edits], prompt_format="chat", max_new_tokens=64, stops=()
    )
    result["answers that end by themselves"] = sum(answer.ended for answer in long) / len(long)
    result["answers"] = {edit.prompt: answer.text for edit, answer in zip(edits, long, strict=True)}
    with options.results.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
