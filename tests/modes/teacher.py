"""A model that learns and forgets by a rule that is written here, for the tests of the modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kedit_train.data import Edit, Probe

N = 12


def facts(n: int = N) -> list[Edit]:
    return [
        Edit(f"P{i}:", f"new{i}", rephrases=(f"R{i}:",), locality={"near": (Probe(f"L{i}:", (f"near{i}",)),)})
        for i in range(n)
    ]


def says(knows: Sequence[bool]) -> dict[str, str]:
    """Return the answers of a model that knows some edits.

    The model also knows the rephrasing of every second known edit. Every fifth known edit changes the answer of its
    neighbour.
    """
    answers = {}
    for i, known in enumerate(knows):
        answers[f"P{i}:"] = f" new{i}" if known else f" old{i}"
        answers[f"R{i}:"] = f" new{i}" if known and i % 2 == 0 else f" old{i}"
        answers[f"L{i}:"] = " hurt" if known and i % 5 == 0 else f" near{i}"
    return answers


def token_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Teacher:
    """Learns the edits, and forgets the edit that comes ``forgets`` places before the first of these edits."""

    def __init__(self, forgets: int = 0) -> None:
        self.forgets, self.calls, self.found = forgets, [], []

    @torch.no_grad()
    def __call__(self, model: Any, edits: Sequence[Edit]) -> None:
        numbers = [int(edit.id) for edit in edits]
        self.found.append(model.knows.clone())
        self.calls.append(numbers)
        lost = min(numbers) - self.forgets
        if self.forgets and lost >= 0:
            model.knows[lost] = 0.0
        model.knows[numbers] = 1.0
