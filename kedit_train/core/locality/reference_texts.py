"""Token sequences with their reference hidden states: reference texts, and a replay buffer of previous edits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kedit_train.core.locality.hidden_state_file import ReferenceStates
from kedit_train.edit import Edit

TokenIds = Sequence[int]


class ReferenceTexts:
    """Sequences of the reference texts with their reference hidden states, drawn in shuffled order.

    Every sequence is drawn once before any is drawn again.

    Args:
        sequences: one list of token ids per sequence.
        states: their reference hidden states.
    """

    def __init__(self, sequences: Sequence[TokenIds], states: ReferenceStates) -> None:
        self.sequences, self.states = sequences, states
        self.allowed = set(range(len(sequences)))

    def restart(self, seed: int) -> None:
        """Start to draw from the beginning of a new order. Must be called before the first :meth:`draw`."""
        self._order = self._shuffled(random.Random(seed))

    def draw(self, n: int) -> list[int]:
        """Return the indices of ``n`` sequences, or of all allowed ones if there are fewer."""
        return [next(self._order) for _ in range(min(n, len(self.allowed)))]

    def restrict(self, sequences: Iterable[TokenIds]) -> int:
        """Draw only sequences that are among ``sequences`` from now on.

        Returns:
            The number of sequences that are left.
        """
        wanted = {tuple(sequence) for sequence in sequences}
        self.allowed = {i for i in self.allowed if tuple(self.sequences[i]) in wanted}
        return len(self.allowed)

    def _shuffled(self, shuffler: random.Random) -> Iterator[int]:
        while True:
            order = list(range(len(self.sequences)))
            shuffler.shuffle(order)
            yield from (i for i in order if i in self.allowed)


@dataclass(frozen=True)
class PreviousEdit:
    """A sequence of an edit of an earlier run.

    Args:
        edit: the edit.
        sequence: token ids of its prompt and target.
        hidden_states: [tokens, hidden], from the model after the run that trained the edit.
    """

    edit: Edit
    sequence: TokenIds
    hidden_states: Tensor


@dataclass
class ReplayBuffer:
    """Edits of earlier runs, so that a later run keeps them.

    The hidden states of an edit are computed when the next run starts: only then is the model after the edit's own run
    certain to be final.

    Attributes:
        entries: sequences of all previous edits.
        pending: edits of the run that ended last, without hidden states yet.
        active: those of ``entries`` that the current run does not edit again.
    """

    entries: list[PreviousEdit] = field(default_factory=list)
    pending: list[Edit] = field(default_factory=list)
    active: list[PreviousEdit] = field(default_factory=list)

    def start_run(self, edits: Iterable[Edit]) -> None:
        """Start a run that trains ``edits``. Previous edits with the same prompts are not drawn in it."""
        prompts = {edit.prompt for edit in edits}
        self.active = [entry for entry in self.entries if entry.edit.prompt not in prompts]

    def finish_run(self, edits: Iterable[Edit]) -> None:
        """Finish a run that trained ``edits``. They replace previous edits with the same prompts."""
        edits = list(edits)
        self.start_run(edits)
        self.entries, self.pending = self.active, edits

    @torch.no_grad()
    def add_pending(
        self, tokenize: Callable[[list[Edit]], Sequence[TokenIds]], hidden_states: Callable[[TokenIds], Tensor]
    ) -> None:
        """Compute the hidden states of the pending edits and add them to the entries.

        Args:
            tokenize: returns the sequences of edits.
            hidden_states: returns the hidden states [tokens, hidden] of a sequence.
        """
        self.entries += [
            PreviousEdit(edit, sequence, hidden_states(sequence).cpu())
            for edit in self.pending
            for sequence in tokenize([edit])
        ]
        self.pending = []

    def draw(self, n: int, shuffler: random.Random) -> list[PreviousEdit]:
        """Return at most ``n`` active entries, each at most once."""
        return shuffler.sample(self.active, min(n, len(self.active)))
