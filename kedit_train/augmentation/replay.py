"""Replay: training examples about facts that are not edited, with the answers of the unedited model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kedit_train import world
from kedit_train.core.locality.texts import Texts
from kedit_train.data import Edit, EditDataset
from kedit_train.data.leaks import LeakCheck
from kedit_train.data.prompts import PromptFormat
from kedit_train.data.readers.files import SUFFIXES
from kedit_train.data.visible import fold
from kedit_train.errors import EditError
from kedit_train.evaluation import generate_answers


@dataclass(frozen=True)
class ReplayedFacts:
    """Training examples about facts that are not edited, with the numbers of prompts that were left out.

    Args:
        examples: prompts with the answers of the unedited model.
        prompts: number of different prompts that were considered.
        leaked: number of prompts left out because they contain the subject or the prompt of an edit, or because prompt
            and answer together contain a scored prompt (see :func:`replay_facts`).
        empty: number of prompts left out because the model generated no text.
        cut_off: number of prompts left out because the model did not end its answer within ``max_new_tokens``.
    """

    examples: tuple[Edit, ...]
    prompts: int
    leaked: int
    empty: int = 0
    cut_off: int = 0

    def describe(self) -> str:
        """Return the numbers of considered and left-out prompts as one phrase."""
        fraction = self.leaked / max(1, self.prompts)
        return (
            f"{self.leaked} of {self.prompts} prompts ({fraction:.1%}) were left out because they contain text of an "
            f"edit, {self.empty} because the model gave no answer, and {self.cut_off} because the answer was too long"
        )


def replay_facts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    edits: Sequence[Edit],
    *,
    limit: int | None = None,
    seed: int = 0,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> ReplayedFacts:
    """Make training examples from prompts about unedited facts, with the model's own greedy answers as targets.

    A prompt is left out if it contains the subject or the prompt of an edit, or if the model gives no answer to it. A
    prompt is also left out if the prompt and its answer together contain a scored prompt. Scored prompts are the
    rephrases of the edits, and the prompts of their locality and portability questions.

    Args:
        model: the unedited model.
        tokenizer: the tokenizer of the model.
        prompts: prompts about facts that are not edited. Prompts that differ only in letter case or white space count
            as one prompt.
        edits: the edits of the run.
        limit: maximum number of examples. The prompts are tried in a random order, drawn with ``seed``. None uses all
            prompts.
        seed: seed of the random order.
        prompt_format: the prompt format of the training: "plain", "chat", "question" or a ``ChatFormat``.
        batch_size: number of prompts per forward pass.
        max_new_tokens: maximum length of an answer in tokens. Prompts with a longer answer are left out.

    Raises:
        EditError: no example is left.

    Example:
        >>> from kedit_train import world
        >>> model, tokenizer = world.load()
        >>> edits = world.edits(2)
        >>> facts = replay_facts(model, tokenizer, world.other_prompts(exclude=edits)[:20], edits, limit=3)
        >>> len(facts.examples)
        3
    """
    check, distinct = LeakCheck(edits), {}
    for prompt in prompts:
        # The model may answer two spellings of one prompt differently. It could not learn both answers.
        distinct.setdefault(fold(prompt), prompt)
    order = list(distinct.values())
    random.Random(seed).shuffle(order)
    allowed = [prompt for prompt in order if not check.is_leak(Edit(prompt, ""))]
    leaked, empty, cut_off = len(order) - len(allowed), 0, 0
    examples: list[Edit] = []
    wanted = len(allowed) if limit is None else limit
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "prompt_format": prompt_format}
    for start in range(0, len(allowed), batch_size):
        if len(examples) >= wanted:
            break
        batch = allowed[start : start + batch_size]
        answers = generate_answers(model, tokenizer, batch, batch_size=batch_size, **options)
        for prompt, answer in zip(batch, answers, strict=True):
            example = Edit(prompt, answer.text, id=f"replayed {prompt!r}")
            if not answer.text:
                empty += 1
            elif not answer.ended:
                cut_off += 1
            elif check.is_leak(example):
                leaked += 1
            else:
                examples.append(example)
    facts = ReplayedFacts(tuple(examples[:wanted]), len(order), leaked, empty, cut_off)
    if not examples:
        raise EditError(
            f"no prompt is left to replay: {facts.describe()}; give more prompts about facts that are not edited."
        )
    return facts


def read_prompts(source: str | Path | Sequence[str], edits: Sequence[Edit]) -> list[str]:
    """Return the prompts that the argument ``replay`` of :func:`augmentation` names.

    Args:
        source: a list of prompts, a ``.txt`` file with one prompt per line, a file of edits, or "world".
        edits: the edits of the run. With "world", prompts about facts that depend on these edits are left out.

    Raises:
        EditError: the file does not exist, or its name has an unknown ending.

    Example:
        >>> read_prompts(["The capital of France is"], [])
        ['The capital of France is']
    """
    if world.is_world(source):
        return world.other_prompts(exclude=edits)
    if not isinstance(source, str | Path):
        return list(source)
    path, kinds = Path(source), ", ".join(SUFFIXES)
    if not path.is_file():
        raise EditError(
            f"replay: file {str(path)!r} does not exist (working directory: {Path.cwd()}); give a .txt file with one "
            f"prompt per line, or a file of edits ({kinds})."
        )
    if path.suffix.lower() not in (".txt", *SUFFIXES):
        raise EditError(
            f"replay: {path} must be a .txt file with one prompt per line, or a file of edits ({kinds}); rename or "
            "convert the file."
        )
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in Texts(source).load()]
    return [edit.prompt for edit in EditDataset.load(source)]
