"""Subtract the contribution of some texts from second moments that an earlier run has computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kedit_train.core.drift.previous_inputs import Moments
from kedit_train.core.locality.consecutive_runs import remaining_texts
from kedit_train.core.locality.texts import Texts
from kedit_train.core.run import EditRun


def remaining_moments(
    moments: Moments, chosen: Sequence[str], texts: Texts, run: EditRun, measure: Callable[[Texts], Moments]
) -> tuple[Moments, Sequence[str]]:
    """Subtract the moments of texts that contain prompts of this run's edits (see :func:`remaining_texts`).

    Args:
        moments: weight -> second moment of the layer inputs on the chosen texts.
        chosen: the texts of the previous run.
        texts: the argument ``texts`` of the callback.
        run: the run that begins.
        measure: a function that returns the second moments on the given texts.

    Returns:
        The moments without the subtracted texts, and the texts that remain. If all texts remain, then ``moments`` and
        ``chosen`` are returned unchanged.
    """
    kept = remaining_texts(texts, chosen, run)
    left = set(kept)
    removed = [text for text in chosen if text not in left]
    if not removed:
        return moments, chosen
    own = measure(replace(texts, source=removed, nearest=None))
    return {name: moment - own[name] for name, moment in moments.items()}, kept
