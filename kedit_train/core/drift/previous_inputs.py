"""Store statistics of the layer inputs on earlier edits, so that later runs can preserve these edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.edit import Edit

Moments: TypeAlias = dict[str, SecondMoment]


class PreviousInputs:
    """The edits of earlier runs, and the second moments of the layer inputs on these edits.

    When a run begins, the model reads only the edits of the previous run. The moments of these edits are added to the
    stored moments. The cost of a run therefore does not grow with the number of earlier edits. There is one exception:
    If a new edit has the same prompt as an edit in the stored moments, the moments of all other earlier edits are
    computed again.

    If the scope has several layers, the stored moments of the upper layers are approximate. Each later run slightly
    changes the inputs of these layers, but the stored moments are not updated.

    Args:
        edits: edits that were made before the first run.

    Attributes:
        edits: all earlier edits. If two runs edit the same prompt, only the edit of the later run is kept.
    """

    def __init__(self, edits: Sequence[Edit] = ()) -> None:
        self.edits = list(edits)
        self._measured: list[Edit] = []
        self._moments: Moments = {}

    def moments(self, current: Sequence[Edit], measure: Callable[[list[Edit]], Moments]) -> Moments:
        """Return the second moments of the layer inputs on all earlier edits whose prompts are not in ``current``.

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
        """Add the edits of a finished run to ``edits``. The next call of :meth:`moments` measures the added edits."""
        self.edits = [*self._kept(current), *current]

    def _kept(self, current: Sequence[Edit]) -> list[Edit]:
        prompts = {edit.prompt for edit in current}
        return [edit for edit in self.edits if edit.prompt not in prompts]
