"""What a checkpoint holds of an edit, and how a resumed run takes it up."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from kedit_train.core.fsdp import placed_like, whole
from kedit_train.errors import EditError

if TYPE_CHECKING:
    from kedit_train.core.run import EditRun


def state_of(run: EditRun) -> dict[str, Any]:
    """What a checkpoint has to hold for the edit to go on as if it had not been interrupted."""
    callbacks = {name: callback.state() for name, callback in _named(run).items()}
    reference = {name: whole(value) for name, value in run.reference.items()}
    settings = {name: repr(callback) for name, callback in _named(run).items()}
    binding = [name for name, callback in _named(run).items() if binds(callback)]
    return {
        "step": run.step,
        "reference": reference,
        "callbacks": callbacks,
        "settings": settings,
        "binding": binding,
    }


def binds(callback: Any) -> bool:
    """Whether the edit would be another one without this callback."""
    return callback.constrains or callback.penalises or callback.skips


def restore(run: EditRun, state: dict[str, Any] | None) -> dict[Any, dict[str, Any]]:
    """Take up the step and the reference of a checkpoint, and return what its callbacks had saved.

    Raises:
        EditError: no state, or that of another scope or without one of the callbacks.
    """
    if state is None:
        raise EditError(
            "the checkpoint holds no state of this edit, so the weights before it are unknown; resume from one "
            "written with these callbacks (with transformers in output_dir), or begin anew from the unedited model"
        )
    # Without ParameterScope nothing has been kept yet: the weights of now are those of the checkpoint.
    wanted = set(run.reference) or set(run.scope if run.needs_reference else ())
    if set(state["reference"]) != wanted:
        raise EditError(
            f"the checkpoint was written with another scope ({len(state['reference'])} tensors, now "
            f"{len(wanted)}); resume with the same ParameterScope"
        )
    named = _named(run)
    missing = [name for name, callback in named.items() if callback.state() and name not in state["callbacks"]]
    if missing:
        raise EditError(f"the checkpoint was written without {', '.join(missing)}; resume with the same callbacks")
    gone = [state["settings"][name] for name in state["binding"] if name not in named]
    if gone:
        raise EditError(f"the checkpoint was written with {', '.join(gone)} as well; resume with the same callbacks")
    for name in state["binding"]:
        then, now = state["settings"][name], repr(named[name])
        if then != now:
            warnings.warn(f"resumed with {now} where the checkpoint was written with {then}", stacklevel=2)
    # Never what the model held when the run was set up: it may have been loaded from the checkpoint itself.
    for name, value in state["reference"].items():
        parameter = run.scope[name]
        run.reference[name] = placed_like(value.to(device=parameter.device, dtype=parameter.dtype), parameter)
    run.steps.count = state["step"]
    return {callback: state["callbacks"][name] for name, callback in named.items() if name in state["callbacks"]}


def _named(run: EditRun) -> dict[str, Any]:
    names = [type(callback).__name__ for callback in run.callbacks]
    return {f"{name}.{names[:i].count(name)}": c for i, (name, c) in enumerate(zip(names, run.callbacks, strict=True))}
