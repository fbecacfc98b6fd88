"""Texts, and the edits of the runs before, held together over a sequence of runs; a single run is a sequence of one."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kedit_train.core.fingerprint import fingerprint
from kedit_train.core.locality.hidden_state_file import Answers
from kedit_train.core.locality.reference_texts import HeldEdits, HeldTexts, Row
from kedit_train.core.locality.texts import hash_rows
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.data import Edit
from kedit_train.errors import EditError


class HeldSequence:
    """What a penalty holds, drawn in one batch: for half of it earlier edits, where there are, else texts.

    Args:
        rows: of the texts.
        answers: to them, before the first run.
        seed: of the draws; each run has draws of its own.
        run: the first one.
        head: the output head that turns the answers into predictions, where it may be asked for in later runs.
    """

    def __init__(
        self, rows: Sequence[Row], answers: Answers, *, seed: int, run: EditRun, head: nn.Module | None = None
    ) -> None:
        self.texts, self.earlier = HeldTexts(rows, answers), HeldEdits()
        self.model, self._seed, self._ended = weakref.ref(run.model), seed, 0
        self._head_then = "" if head is None else fingerprint(head)
        self._begin(0)

    def draw(self, n: int) -> tuple[list[int], Sequence[Row], Sequence[Tensor]]:
        """A step's batch: numbers of texts; rows of earlier edits, and their answers."""
        self._draws += 1
        earlier, states = self.earlier.draw(n // 2, self._shuffler)
        return self.texts.draw(n - len(earlier)), earlier, states

    def go_on(
        self,
        run: EditRun,
        rows: Sequence[Row],
        head: nn.Module,
        rows_of: Callable[[list[Edit]], Sequence[Row]],
        answer: Callable[[Row], Tensor],
    ) -> None:
        """Begin a later run: of its texts those that the first one had, and the edits before it.

        Args:
            run: its weights may be those of a checkpoint already, where a trainer resumes.
            rows: the texts that may stay in this run.
            head: as in the first run.
            rows_of, answer: rows of edits, and what the model now says of a row.

        Raises:
            EditError: the head has changed, or no text is left.
        """
        if fingerprint(head) != self._head_then:
            raise EditError(
                "KLLocality: the output head is no longer that of the first run, so the answers that are kept cannot "
                "be told any more (sequential=True); make a new KLLocality for another sequence"
            )
        if not self.texts.keep(rows):
            raise EditError(
                "KLLocality: every text of the first run holds a prompt that this run's edits are scored on, or is no "
                "longer among the texts; give other texts"
            )
        if self.earlier.pending:
            with run.unedited(), evaluation_mode(run.model), run.host.forward_context():
                self.earlier.settle(rows_of, answer)
        self.earlier.begin(run.edits)
        self._begin(self._ended)

    def end(self, edits: Sequence[Edit]) -> None:
        """A run of these edits has ended well."""
        self.earlier.supersede(edits)
        self._ended += 1

    def state(self) -> dict[str, Any]:
        """How far the draws are, and of which run."""
        return {"draws": self._draws, "run": self._run, "earlier": self._said(), "texts": hash_rows(self.texts.rows)}

    def load_state(self, state: dict[str, Any], n: int) -> None:
        """Draw on from there, ``n`` at a time.

        Raises:
            EditError: the state is of a run that held other texts, or whose earlier runs were not seen.
        """
        if state["texts"] != hash_rows(self.texts.rows):
            raise EditError(
                "KLLocality: the checkpoint is of a run that held other texts, or cut or chose them otherwise; resume "
                "with the same texts, max_length and nearest, or begin anew"
            )
        if state["earlier"] != self._said() or (state["run"] and not self._ended):
            raise EditError(
                "KLLocality: the checkpoint is of a later run of a sequence (sequential=True), whose earlier runs this "
                "KLLocality has not seen, so the answers before them are gone; begin that run again, with the model "
                "before the sequence as teacher="
            )
        self._begin(state["run"])
        for _ in range(state["draws"]):
            self.draw(n)

    def _begin(self, number: int) -> None:
        self._run, self._draws = number, 0
        self.texts.begin(self._seed + number)
        self._shuffler = random.Random(self._seed + number)

    def _said(self) -> list[list[str]]:
        return [[edit.prompt, edit.target] for edit, *_ in self.earlier.beside]
