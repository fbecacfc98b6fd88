"""Checks for callbacks that keep data from one run to the next run on the same model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from kedit_train import world
from kedit_train.core.locality.texts import Texts
from kedit_train.core.run import EditRun
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError, warn


def continues_run(previous_model: weakref.ref[nn.Module] | None, run: EditRun) -> bool:
    """Return whether ``run`` trains the same model object as the previous run.

    Args:
        previous_model: the model of the previous run; None before the first run.
        run: the run that begins.

    Warns:
        UserWarning: the previous run trained another model, so the data of the previous run cannot be used.
    """
    if previous_model is None:
        return False
    if previous_model() is run.model:
        return True
    warn(
        "sequential=True needs the same model object in every run, but this run trains another model object. The data "
        "of the previous runs is discarded; train the same model object in every run, or create a new callback for "
        "each model."
    )
    return False


def require_edits(run: EditRun, reason: str) -> None:
    """Raise an error if the edits of the run are unknown.

    Args:
        run: the run that begins.
        reason: the beginning of the error message. It says which argument needs the edits, and for what.
    """
    if not run.edits:
        raise EditError(
            f"{reason}, but the edits of this run are unknown; pass them with the callback EditMetrics(edits) or with "
            "editing(edits=...)."
        )


def readable_again(edits: Any) -> Any:
    """Return the argument ``edits`` of a callback so that every run can read it: an iterator becomes a list."""
    return list(edits) if isinstance(edits, Iterator) else edits


def given_edits(run: EditRun, edits: Any) -> Sequence[Edit]:
    """Return the edits that a callback was given. If it was given none, return the edits of the run.

    Args:
        run: the run that begins.
        edits: the argument ``edits`` of the callback: a path, a list of ``Edit``, an ``EditDataset`` or None.

    Raises:
        EditError: there are no edits.
    """
    found = run.edits if edits is None else EditDataset.of(edits)
    if not found:
        raise EditError(
            "the edits of this run are unknown; pass edits= (a path, a list of Edit or an EditDataset), or add "
            "EditMetrics(edits)."
        )
    return found


def remaining_texts(texts: Texts, chosen: Sequence[str], run: EditRun) -> list[str]:
    """Return the texts of the previous run that the new run can still use.

    A text is left out if it contains an evaluation prompt of the new run's edits. If the source of the texts is
    "world", a text is left out if it states a fact that these edits affect or ask about.

    Args:
        texts: the argument ``texts`` of the callback.
        chosen: the texts of the previous run.
        run: the run that begins.

    Raises:
        EditError: no text is left.
    """
    if texts.of_world:
        return world.unaffected(chosen, run.edits)
    return replace(texts, source=list(chosen), nearest=None).load(run.edits, tokenizer=run.tokenizer(texts.tokenizer))
