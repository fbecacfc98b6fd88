"""Store token sequences of reference texts and previous edits, and the reference hidden states of these sequences."""

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
    """Stores sequences of reference texts and their reference hidden states, and draws sequences in shuffled order.

    Every sequence is drawn once before any sequence is drawn again.

    Args:
        sequences: one list of token ids per sequence.
        states: the reference hidden states of the sequences.
    """

    def __init__(self, sequences: Sequence[TokenIds], states: ReferenceStates) -> None:
        self.sequences, self.states = sequences, states
        self.allowed = set(range(len(sequences)))

    def restart(self, seed: int) -> None:
        """Shuffle the sequences with ``seed`` and draw from the start. Call this before the first :meth:`draw`."""
        self._order = self._shuffled(random.Random(seed))

    def draw(self, n: int) -> list[int]:
        """Return the indices of ``n`` sequences, or of all remaining sequences if fewer than ``n`` remain."""
        return [next(self._order) for _ in range(min(n, len(self.allowed)))]

    def restrict(self, sequences: Iterable[TokenIds]) -> int:
        """From now on, draw only the sequences that are also in ``sequences``.

        Returns:
            The number of sequences that can still be drawn.
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
    """One token sequence of an edit from an earlier run.

    Args:
        edit: the edit.
        sequence: token ids of the edit's prompt and target.
        hidden_states: [tokens, hidden], computed by the model after the run that trained the edit.
    """

    edit: Edit
    sequence: TokenIds
    hidden_states: Tensor


@dataclass
class ReplayBuffer:
    """Stores the edits of finished runs. Later runs draw these edits, so that the model does not forget them.

    The hidden states of an edit are computed when the next run starts, because the model may still change until then.

    Attributes:
        entries: token sequences of previous edits, with hidden states.
        pending: edits of the last finished run. They are not in ``entries`` yet, because they have no hidden states.
        active: the entries that the current run can draw. An entry is excluded if this run has an edit with the same
            prompt.
    """

    entries: list[PreviousEdit] = field(default_factory=list)
    pending: list[Edit] = field(default_factory=list)
    active: list[PreviousEdit] = field(default_factory=list)

    def start_run(self, edits: Iterable[Edit]) -> None:
        """Start a run that trains ``edits``. Previous edits with the same prompts are not drawn."""
        prompts = {edit.prompt for edit in edits}
        self.active = [entry for entry in self.entries if entry.edit.prompt not in prompts]

    def finish_run(self, edits: Iterable[Edit]) -> None:
        """Finish a run that trained ``edits``. The new edits replace previous edits with the same prompts."""
        edits = list(edits)
        self.start_run(edits)
        self.entries, self.pending = self.active, edits

    @torch.no_grad()
    def add_pending(
        self, tokenize: Callable[[list[Edit]], Sequence[TokenIds]], hidden_states: Callable[[TokenIds], Tensor]
    ) -> None:
        """Compute the hidden states of the edits in ``pending``, and move these edits to ``entries``.

        Args:
            tokenize: returns the token sequences of a list of edits.
            hidden_states: returns the hidden states [tokens, hidden] of a sequence.
        """
        self.entries += [
            PreviousEdit(edit, sequence, hidden_states(sequence).cpu())
            for edit in self.pending
            for sequence in tokenize([edit])
        ]
        self.pending = []

    def draw(self, n: int, shuffler: random.Random) -> list[PreviousEdit]:
        """Draw at most ``n`` active entries at random, each entry at most once."""
        return shuffler.sample(self.active, min(n, len(self.active)))
