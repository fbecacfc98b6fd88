"""Keep the layer inputs on the edits of earlier runs, so that a later run can preserve the outputs for these edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.edit import Edit

Moments: TypeAlias = dict[str, SecondMoment]


class PreviousInputs:
    """The edits of earlier runs, and, for each weight, the second moment of the layer inputs on all these edits.

    Before a run, only the edits of the previous run are read. The second moments of the layer inputs on these edits are
    added to the moments of all earlier edits. The cost of a run therefore does not grow with the number of earlier
    edits. If the scope has several layers, later runs slightly change the inputs of the upper layers, and the moments
    of earlier edits are not measured again.

    Args:
        edits: edits that count as earlier edits from the beginning.

    Attributes:
        edits: the earlier edits. A later edit with the same prompt replaces the earlier edit.
    """

    def __init__(self, edits: Sequence[Edit] = ()) -> None:
        self.edits = list(edits)
        self._measured: list[Edit] = []
        self._moments: Moments = {}

    def moments(self, current: Sequence[Edit], measure: Callable[[list[Edit]], Moments]) -> Moments:
        """Return the second moments of the inputs on all earlier edits whose prompt is not edited again.

        Args:
            current: the edits of the run that begins.
            measure: returns the second moments of the inputs on some edits, for the model as it is now.

        Returns:
            weight -> second moment, or an empty dict if there are no earlier edits to preserve.
        """
        kept = self._kept(current)
        if kept[: len(self._measured)] != self._measured:
            # An edit that is made again must not be preserved, so all other earlier edits are measured again.
            self._measured, self._moments = [], {}
        if new := kept[len(self._measured) :]:
            added = measure(new)
            self._moments = {name: self._moments[name] + m if self._moments else m for name, m in added.items()}
        self._measured = kept
        return self._moments

    def finish(self, current: Sequence[Edit]) -> None:
        """Add the edits of a run that has ended. Their inputs are measured before the next run."""
        self.edits = [*self._kept(current), *current]

    def _kept(self, current: Sequence[Edit]) -> list[Edit]:
        prompts = {edit.prompt for edit in current}
        return [edit for edit in self.edits if edit.prompt not in prompts]
