"""The layer inputs on the edits of earlier runs, so that a later run can preserve the outputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.edit import Edit

Moments: TypeAlias = dict[str, SecondMoment]


class PreviousInputs:
    """The edits of earlier runs, and one second moment per weight of the layer inputs on all of them.

    Before a run, only the edits of the run before it are read. Their second moments are added to those of all earlier
    edits. The cost of a run therefore does not grow with the number of earlier edits.

    Args:
        edits: edits that count as earlier edits from the beginning.

    Attributes:
        edits: the earlier edits. A later edit with the same prompt replaces the earlier edit.
    """

    def __init__(self, edits: Sequence[Edit] = ()) -> None:
        self.edits = list(edits)
        self._measured = 0
        self._moments: Moments = {}
        self._kept: tuple[list[Edit], Moments] = [], {}

    def moments(self, current: Sequence[Edit], measure: Callable[[list[Edit]], Moments]) -> Moments:
        """Return the second moments of the inputs on all earlier edits whose prompt is not edited again.

        Args:
            current: the edits of the run that begins.
            measure: returns the second moments of the inputs on some edits, for the model as it is now.

        Returns:
            weight -> second moment, or an empty dict if there are no earlier edits to preserve.
        """
        if new := self.edits[self._measured :]:
            self._moments = _sum(self._moments, measure(new))
            self._measured = len(self.edits)
        prompts = {edit.prompt for edit in current}
        kept = [edit for edit in self.edits if edit.prompt not in prompts]
        moments = self._moments if kept else {}
        if kept and len(kept) < len(self.edits):
            # The inputs have hardly changed since they were measured, because they were preserved.
            replaced = measure([edit for edit in self.edits if edit.prompt in prompts])
            moments = {name: _difference(moment, replaced[name]) for name, moment in moments.items()}
        self._kept = kept, moments
        return moments

    def finish(self, current: Sequence[Edit]) -> None:
        """Add the edits of a run that has ended. Their inputs are measured before the next run."""
        kept, self._moments = self._kept
        self.edits, self._measured = [*kept, *current], len(kept)


def _sum(first: Moments, second: Moments) -> Moments:
    return {name: first[name] + moment if first else moment for name, moment in second.items()}


def _difference(whole: SecondMoment, part: SecondMoment) -> SecondMoment:
    return SecondMoment(whole.sum - part.sum, whole.count - part.count)
