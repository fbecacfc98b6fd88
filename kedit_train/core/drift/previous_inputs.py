"""Store statistics of the layer inputs on earlier edits, so that later runs can preserve the outputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.edit import Edit

Moments: TypeAlias = dict[str, SecondMoment]


class PreviousInputs:
    """The edits of earlier runs, and the second moments of the layer inputs on these edits.

    Before each run, the model reads only the edits of the run before it. The second moments of the layer inputs on
    these edits are added to the stored moments. The cost of a run therefore does not grow with the number of earlier
    edits. There is one exception: If the new run has the same prompt as an earlier edit in the stored moments, the
    moments of all other earlier edits are computed again.

    If the scope has several layers, the stored moments of the upper layers are approximate. Each later run slightly
    changes the inputs of these layers, but the stored moments are not updated.

    Args:
        edits: edits that the first run already preserves.

    Attributes:
        edits: the earlier edits. A later edit with the same prompt replaces the earlier edit.
    """

    def __init__(self, edits: Sequence[Edit] = ()) -> None:
        self.edits = list(edits)
        self._measured: list[Edit] = []
        self._moments: Moments = {}

    def moments(self, current: Sequence[Edit], measure: Callable[[list[Edit]], Moments]) -> Moments:
        """Return the second moments of the layer inputs on all earlier edits that ``current`` does not replace.

        Args:
            current: the edits of the new run. They replace earlier edits with the same prompts.
            measure: a function that runs the current model on a list of edits, and returns the second moments of the
                layer inputs.

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
        """Remember the edits of a finished run as earlier edits. The next call of :meth:`moments` measures them."""
        self.edits = [*self._kept(current), *current]

    def _kept(self, current: Sequence[Edit]) -> list[Edit]:
        prompts = {edit.prompt for edit in current}
        return [edit for edit in self.edits if edit.prompt not in prompts]
