"""Draw batches for a locality penalty from reference texts and, in later runs, from previous edits."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kedit_train.core.cache.sequence_keys import hash_sequences
from kedit_train.core.fingerprint import fingerprint
from kedit_train.core.locality.hidden_state_file import ReferenceStates
from kedit_train.core.locality.reference_texts import PreviousEdit, ReferenceTexts, ReplayBuffer, TokenIds
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.edit import Edit
from kedit_train.errors import EditError


class ReferenceBatches:
    """Draws the batches of a locality penalty in one run or in consecutive runs on the same model.

    In every run after the first, up to half of each batch consists of edits from previous runs. All other sequences of
    a batch are reference texts.

    Args:
        sequences: token ids of the reference texts.
        states: reference hidden states of the sequences, computed by the model before the first run.
        seed: seed of the draws. Run number ``n``, counted from 0, uses ``seed + n``.
        run: the first run.
        head: the output head. Required if more runs will follow. The output head must not change, because every run
            uses it to compute logits from the stored hidden states.
    """

    def __init__(
        self,
        sequences: Sequence[TokenIds],
        states: ReferenceStates,
        *,
        seed: int,
        run: EditRun,
        head: nn.Module | None = None,
    ) -> None:
        self.texts, self.replay_buffer = ReferenceTexts(sequences, states), ReplayBuffer()
        self.model, self._seed, self._finished_runs = weakref.ref(run.model), seed, 0
        self._head_fingerprint = "" if head is None else fingerprint(head)
        self._start_draws(0)

    def draw(self, batch_size: int) -> tuple[list[int], list[PreviousEdit]]:
        """Return one batch: the indices of its reference sequences, and the previous edits that it contains."""
        self._draws += 1
        previous = self.replay_buffer.draw(batch_size // 2, self._shuffler)
        return self.texts.draw(batch_size - len(previous)), previous

    def start_next_run(
        self,
        run: EditRun,
        sequences: Sequence[TokenIds],
        head: nn.Module,
        tokenize: Callable[[list[Edit]], Sequence[TokenIds]],
        hidden_states: Callable[[TokenIds], Tensor],
    ) -> None:
        """Start the next run: keep only the reference texts in ``sequences``, and add the edits of the last run.

        Args:
            run: the run that starts. The hidden states of the last run's edits are computed with the weights before
                this run, even if the weights of a checkpoint have already been loaded.
            sequences: token ids of the texts that may be used in this run.
            head: the output head, unchanged since the first run.
            tokenize: returns the token sequences of a list of edits.
            hidden_states: returns the hidden states [tokens, hidden] of a sequence.

        Raises:
            EditError: the head has changed, or no reference text is left.
        """
        if fingerprint(head) != self._head_fingerprint:
            raise EditError(
                "the output head has changed since the first run, so the reference hidden states stored for "
                "sequential=True cannot be used any more; create a new callback for the next runs."
            )
        if not self.texts.restrict(sequences):
            raise EditError(
                "with sequential=True, every run uses the texts of the first run, but none of them can be used in this "
                "run: each text has been removed from the argument texts, or contains an evaluation prompt of this "
                "run; create a new callback with other texts."
            )
        if self.replay_buffer.pending:
            with run.reference_model(), evaluation_mode(run.model), run.host.forward_context():
                self.replay_buffer.add_pending(tokenize, hidden_states)
        self.replay_buffer.start_run(run.edits)
        self._start_draws(self._finished_runs)

    def finish_run(self, edits: Sequence[Edit]) -> None:
        """Record that a run has trained ``edits``. Do not call this method for a run that failed."""
        self.replay_buffer.finish_run(edits)
        self._finished_runs += 1

    def state(self) -> dict[str, Any]:
        """Return the checkpoint state: number of draws, run number, previous edits and a hash of the texts."""
        return {
            "draws": self._draws,
            "run": self._run,
            "previous_edits": self._previous_edits(),
            "texts": hash_sequences(self.texts.sequences),
        }

    def load_state(self, state: dict[str, Any], batch_size: int) -> None:
        """Restore the state of a checkpoint, so that the next batch is the first batch after the checkpoint.

        Args:
            state: as returned by :meth:`state`.
            batch_size: number of sequences per draw.

        Raises:
            EditError: the checkpoint was written with other reference texts, or the hidden states of the previous
                edits are missing. Checkpoints do not contain these hidden states. Only an object that was used in the
                previous runs has them.
        """
        if state["texts"] != hash_sequences(self.texts.sequences):
            raise EditError(
                "the checkpoint was written with other reference texts, or with other token sequences of the same "
                "texts; resume with the same texts and the same values of max_length= and nearest=, or start a new run."
            )
        if state["previous_edits"] != self._previous_edits() or (state["run"] and not self._finished_runs):
            raise EditError(
                "this run cannot be resumed, because sequential=True needs the reference hidden states of the previous "
                "runs, and the checkpoint does not contain these states; start this run again from its first step, "
                "with teacher= (the model before the first run) instead of sequential=True."
            )
        self._start_draws(state["run"])
        for _ in range(state["draws"]):
            self.draw(batch_size)

    def _start_draws(self, run: int) -> None:
        self._run, self._draws = run, 0
        self.texts.restart(self._seed + run)
        self._shuffler = random.Random(self._seed + run)

    def _previous_edits(self) -> list[list[str]]:
        return [[entry.edit.prompt, entry.edit.target] for entry in self.replay_buffer.active]
