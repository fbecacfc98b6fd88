"""Detect a model whose edit was interrupted, so that no new edit uses the half-edited weights as its reference."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from kedit_train.core.checksums import checksums
from kedit_train.core.state import RunState
from kedit_train.core.state_file import FILE
from kedit_train.errors import EditError, warn

_ATTRIBUTE = "_kedit_interrupted"


def mark_interrupted(run: RunState) -> None:
    """Mark the model as interrupted: a run has changed its weights and has not finished."""
    before = {name: (value.dtype, checksums([value])) for name, value in run.reference.items()}
    run.model.__dict__[_ATTRIBUTE] = {"step": run.step, "before": before}
    # The parameters are marked too, because another model object, such as a PEFT wrapper, may contain them later.
    for name, parameter in run.scope.items():
        setattr(parameter, _ATTRIBUTE, {"step": run.step, "before": before.get(name)})


def check_not_interrupted(run: RunState) -> None:
    """Raise an error if a new run begins on a model with half-edited weights from an interrupted run.

    There is no error if the run resumes from a checkpoint, or if the weights from before the interrupted run have been
    loaded again. If the user has loaded the model from a checkpoint of an unfinished edit, there is only a warning.

    Raises:
        EditError: an interrupted run has left half-edited weights in the model.
    """
    _warn_about_checkpoint(run)
    mark = run.model.__dict__.get(_ATTRIBUTE)
    marked = [p for p in run.root.parameters() if hasattr(p, _ATTRIBUTE)]
    if mark is None and not marked:
        return
    edited = [p for p in marked if not _has_values(p, getattr(p, _ATTRIBUTE)["before"])]
    is_clean = not edited and (mark is None or _has_weights(run.model, mark["before"]))
    mark = mark or getattr((edited or marked)[0], _ATTRIBUTE)
    if not run.host.resumed and not is_clean:
        raise EditError(
            f"this model contains {mark['step']} steps of an edit that was interrupted, so the weights before the edit "
            "are lost; load the model again, or resume the interrupted run from its checkpoint."
        )
    run.model.__dict__.pop(_ATTRIBUTE, None)
    for parameter in marked:
        delattr(parameter, _ATTRIBUTE)


def _has_values(parameter: nn.Parameter, before: tuple[torch.dtype, list[int]] | None) -> bool:
    """Return whether a parameter has the values from before the interrupted edit."""
    # The new run may have converted its scope to fp32 already.
    return before is not None and checksums([parameter.detach().to(before[0])]) == before[1]


def _has_weights(model: nn.Module, before: dict[str, tuple[torch.dtype, list[int]]]) -> bool:
    parameters = dict(model.named_parameters())
    return bool(before) and all(
        name in parameters and _has_values(parameters[name], value) for name, value in before.items()
    )


def _warn_about_checkpoint(run: RunState) -> None:
    """Warn if a new run trains a model that was loaded from a trainer's checkpoint of an unfinished edit."""
    name = getattr(getattr(run.model, "config", None), "_name_or_path", None)
    if run.host.resumed or not run.host.is_main or not isinstance(name, str) or not name:
        return
    folder = Path(name)
    # If a process was killed while it saved the checkpoint, the state file is next to the folder.
    if not (folder / FILE).is_file() and not (folder.parent / f"{folder.name}-{FILE}").is_file():
        return
    step, steps = _progress(folder)
    if step is not None and steps is not None and 0 < steps <= step:
        return
    when = "" if step is None else f" (step {step} of {steps})"
    warn(
        f"the model was loaded from {name}, a checkpoint of an unfinished edit{when}. This run begins a new edit, "
        "which uses the half-edited weights as its reference weights. To continue the unfinished edit instead, call "
        f"trainer.train(resume_from_checkpoint={name!r}) with the callbacks of the unfinished edit. If you want a "
        "new edit on top of the half-edited weights, ignore this warning."
    )


def _progress(folder: Path) -> tuple[int | None, int | None]:
    """Return the step of a saved checkpoint and the planned number of training steps, or (None, None) if unknown."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
