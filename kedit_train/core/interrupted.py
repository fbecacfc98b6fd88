"""Recognize a model whose edit was interrupted, so that no new edit takes half-edited weights as its reference."""

from __future__ import annotations

from torch import Tensor, nn

from kedit_train.core.checksums import checksums
from kedit_train.core.state import RunState
from kedit_train.errors import EditError

_ATTRIBUTE = "_kedit_interrupted"


def mark_interrupted(run: RunState) -> None:
    """Remember on the model that an edit has changed its weights and did not reach its end."""
    before = dict(zip(run.reference, checksums(run.reference.values()), strict=True))
    run.model.__dict__[_ATTRIBUTE] = {"step": run.step, "before": before}


def check_not_interrupted(run: RunState) -> None:
    """Raise an error if the weights of the model are those of an interrupted edit.

    There is no error if the run resumes from a checkpoint, or if the weights from before the interrupted edit have been
    loaded into the model.

    Raises:
        EditError: the model contains a part of another edit.
    """
    mark = run.model.__dict__.get(_ATTRIBUTE)
    if mark is None:
        return
    if not run.host.resumed and not _has_weights(run.model, mark["before"]):
        raise EditError(
            f"this model contains {mark['step']} steps of an edit that was interrupted, so the weights before the edit "
            "are lost; load the model again, or resume the interrupted run from its checkpoint."
        )
    del run.model.__dict__[_ATTRIBUTE]


def _has_weights(model: nn.Module, before: dict[str, int]) -> bool:
    """Return whether all weights in ``before``, a dict from parameter name to checksum, are in the model."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    names = [name for name in before if name in parameters]
    return bool(before) and checksums(parameters[name] for name in names) == list(before.values())
