"""Rows of tokens whose answers are held over one run of edits, or over a sequence of runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kedit_train.core.locality.hidden_state_file import Answers
from kedit_train.data import Edit

Row = Sequence[int]


class HeldTexts:
    """Rows of texts with the answers that are to stay, drawn in shuffled rounds.

    Args:
        rows: of tokens.
        answers: to them.
    """

    def __init__(self, rows: Sequence[Row], answers: Answers) -> None:
        self.rows, self.answers = rows, answers
        self._allowed = set(range(len(rows)))

    def begin(self, seed: int) -> None:
        """Shuffle from the start; before the first draw."""
        self._order = self._rounds(random.Random(seed))

    def draw(self, n: int) -> list[int]:
        """Numbers of ``n`` rows, or of all where there are fewer."""
        return [next(self._order) for _ in range(min(n, len(self._allowed)))]

    def keep(self, rows: Iterable[Row]) -> int:
        """Draw none but these from now on, where they are held; how many are left."""
        wanted = {tuple(row) for row in rows}
        self._allowed = {i for i in self._allowed if tuple(self.rows[i]) in wanted}
        return len(self._allowed)

    def _rounds(self, shuffler: random.Random) -> Iterator[int]:
        while True:
            order = list(range(len(self.rows)))
            shuffler.shuffle(order)
            yield from (i for i in order if i in self._allowed)


@dataclass
class HeldEdits:
    """Edits of earlier runs as rows, with the answers that the model gave once they were learned.

    Args:
        edits: whose answers are held: for each its rows, and their answers [tokens, ...].
        pending: edits of the run that ended last, whose answers nobody has taken yet.
        beside: those of ``edits`` that the run under way does not edit again.
    """

    edits: list[tuple[Edit, Row, Tensor]] = field(default_factory=list)
    pending: list[Edit] = field(default_factory=list)
    beside: list[tuple[Edit, Row, Tensor]] = field(default_factory=list)

    def begin(self, edits: Iterable[Edit]) -> None:
        """A run of these edits: nothing is forgotten before it has ended."""
        prompts = {edit.prompt for edit in edits}
        self.beside = [held for held in self.edits if held[0].prompt not in prompts]

    def supersede(self, edits: Iterable[Edit]) -> None:
        """A run of these edits has ended: earlier ones of the same prompts are over."""
        self.begin(edits)
        self.edits, self.pending = self.beside, list(edits)

    @torch.no_grad()
    def settle(self, rows_of: Callable[[list[Edit]], Sequence[Row]], answer: Callable[[Row], Tensor]) -> None:
        """Take the answers that were pending."""
        self.edits += [(edit, row, answer(row).cpu()) for edit in self.pending for row in rows_of([edit])]
        self.pending = []

    def draw(self, n: int, shuffler: random.Random) -> tuple[list[Row], list[Tensor]]:
        """At most ``n`` rows, each once, and their answers."""
        chosen = shuffler.sample(self.beside, min(n, len(self.beside)))
        return [row for _, row, _ in chosen], [answers for *_, answers in chosen]
