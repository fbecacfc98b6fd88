"""What a checkpoint stores about an edit, and how a resumed run restores it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.core.adapter_scales import adapter_scales, check_adapter_scales
from kedit_train.core.checksums import checksums
from kedit_train.core.fsdp import full_tensor, shard_like
from kedit_train.core.state import RunState
from kedit_train.errors import EditError, warn

# The format of the state of an edit. Version 0.1 of kedit-train wrote states without this number and with other keys.
FORMAT = 2
_KINDS = {"reference": Mapping, "callbacks": Mapping, "settings": Mapping, "binding": list}


def checkpoint_state(run: RunState, frozen: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return the checkpoint state that lets a resumed run continue as if it had not been interrupted.

    Args:
        run: the run.
        frozen: the checksum of each frozen parameter, by its name in ``run.root``. None saves no checksums.
    """
    callbacks = {name: callback.state() for name, callback in named_callbacks(run).items()}
    reference = {name: full_tensor(value) for name, value in run.reference.items()}
    settings = {name: repr(callback) for name, callback in named_callbacks(run).items()}
    binding = [name for name, callback in named_callbacks(run).items() if changes_training(callback)]
    return {
        "format": FORMAT,
        "step": run.step,
        "reference": reference,
        "callbacks": callbacks,
        "settings": settings,
        "binding": binding,
        "adapter_scales": adapter_scales(run.model),
        # JSON cannot represent NaN and infinity.
        "scores": {name: value for name, value in run.scores.items() if math.isfinite(value)},
        "published_at": dict(run.published_at),
        "checksums": {"scope": scope_checksums(run), "frozen": dict(frozen or {})},
    }


def scope_checksums(run: RunState) -> dict[str, int]:
    """Return the checksum of each weight in scope.

    Sharded weights are gathered first, so every process must call this function.
    """
    return {name: checksums([full_tensor(p.detach())])[0] for name, p in run.scope.items()}


def with_current_weights(run: RunState, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``state`` with checksums of the current weights, for a checkpoint that is saved after the run.

    When a run ends, weights that were trained in fp32 are rounded to the model's dtype, so the old checksums no longer
    match. A resumed run computes its checksums in fp32. The rounded weights are therefore converted to fp32 here, too.
    """
    dtypes = {name: value.dtype for name, value in state["reference"].items()}
    weights = {name: full_tensor(p.detach()) for name, p in run.scope.items()}
    scope = {name: checksums([value.to(dtypes.get(name, value.dtype))])[0] for name, value in weights.items()}
    return {**state, "checksums": {**state["checksums"], "scope": scope}}


def has_other_weights(run: RunState, state: Mapping[str, Any]) -> bool:
    """Return whether the weights in scope differ from those of the checkpoint.

    For a checkpoint of version 0.2.0, which contains no checksums, the result is False.
    """
    return "checksums" in state and state["checksums"].get("scope") != scope_checksums(run)


def changes_training(callback: Any) -> bool:
    """Return whether the trained weights depend on this callback."""
    return callback.constrains or callback.penalizes or callback.skips


def check_scope(run: RunState, state: dict[str, Any]) -> None:
    """Raise an error if the checkpoint and ``run`` have different scopes or different adapter scales."""
    # Without ParameterScope, no reference values have been copied yet, so the names in the scope are compared.
    expected = set(run.reference) or set(run.scope if run.needs_reference else ())
    if set(state["reference"]) != expected:
        name = min(set(state["reference"]) ^ expected)
        where = "this run" if name in expected else "the checkpoint"
        raise EditError(
            f"the checkpoint was written with another scope: {name} is only in the scope of {where} (tensors in scope: "
            f"{len(state['reference'])} in the checkpoint, {len(expected)} in this run); resume with the same "
            "ParameterScope."
        )
    for name, value in state["reference"].items():
        if value.shape != run.shapes[name]:
            raise EditError(
                f"the checkpoint was written with the parameter {name!r} of shape {tuple(value.shape)}, but in the "
                f"model it has shape {tuple(run.shapes[name])}; resume with the same model."
            )
    # Earlier versions did not save the scales.
    check_adapter_scales(run.model, state.get("adapter_scales", {}))


def check_state(state: Any) -> None:
    """Raise an error if an object is not a result of :func:`checkpoint_state`.

    Raises:
        EditError: the object is not the state of an edit, was written by another version, or is incomplete.
    """
    if not isinstance(state, Mapping):
        raise EditError(f"the state of the edit must be a dict from edit.state_dict(), got {type(state).__name__}.")
    if state.get("format") != FORMAT:
        raise EditError(
            "the checkpoint was written by another version of kedit-train, and this version cannot resume it; use the "
            "version that wrote the checkpoint, or start again from the unedited model."
        )
    step = state.get("step")
    wrong = next((name for name, kind in _KINDS.items() if not isinstance(state.get(name), kind)), None)
    if wrong is None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        wrong = "step"
    if wrong is None and not all(isinstance(value, Tensor) for value in state["reference"].values()):
        wrong = "reference"
    if wrong is None and not all(name in state["settings"] for name in state["binding"]):
        wrong = "settings"
    if wrong is not None:
        raise EditError(
            f"the state of the edit is damaged: {wrong!r} is missing or has a wrong value; resume from another "
            "checkpoint."
        )


def _check_weights(run: RunState, state: Mapping[str, Any]) -> None:
    """Raise an error if the model does not have the weights that it had when the state was written."""
    if has_other_weights(run, state):
        raise EditError(
            "the model must have the weights of the checkpoint, but the model's weights in scope are different; resume "
            "from a checkpoint whose weights and kedit_state.safetensors are from the same step."
        )
    saved = state.get("checksums", {}).get("frozen", {})
    parameters = {n: p for n, p in run.root.named_parameters() if n in saved and has_checksum(p)}
    for (name, parameter), value in zip(parameters.items(), checksums(parameters.values()), strict=True):
        if saved[name] != value:
            raise EditError(
                f"{name} is not trained (it is outside the scope), but its values differ from those in the run that "
                "wrote the checkpoint; load the same base model as in that run, in the same dtype (this run uses "
                f"{parameter.dtype})."
            )


def has_checksum(parameter: Tensor) -> bool:
    """Return whether the checksum of a frozen parameter is saved in checkpoints.

    Sharded, offloaded and quantized parameters have no checksum. The checksum of a quantized parameter would not be
    reliable, because a GPU and a CPU may quantize the same weights differently.
    """
    return parameter.is_floating_point() and not isinstance(parameter, DTensor) and not parameter.is_meta


def restore(run: RunState, state: dict[str, Any] | None) -> dict[Any, dict[str, Any]]:
    """Restore the step number and the reference values (the weights before the edit) from a checkpoint.

    Args:
        run: the run that starts.
        state: the result of :func:`checkpoint_state` from the checkpoint, or None if the checkpoint has no such state.

    Returns:
        A dict from callback to its saved ``state()``. It contains every callback that has a state in the checkpoint.

    Raises:
        EditError: the state is missing, was written by another version of this library, or belongs to a run with
            another scope or other callbacks.
    """
    if state is None:
        raise EditError(
            "the checkpoint contains no state of this edit, so the weights before the edit are unknown; resume from a "
            "checkpoint that was written with these callbacks (with transformers, a checkpoint in output_dir), or "
            "start again from the unedited model."
        )
    check_state(state)
    check_scope(run, state)
    named = named_callbacks(run)
    added = [name for name, callback in named.items() if callback.state() and name not in state["callbacks"]]
    if added:
        raise EditError(
            f"the checkpoint was written without {', '.join(added)}, which this run uses; resume with the same "
            "callbacks."
        )
    removed = [state["settings"][name] for name in state["binding"] if name not in named]
    if removed:
        raise EditError(
            f"the checkpoint was written with {', '.join(removed)}, which this run does not use; resume with the same "
            "callbacks."
        )
    for name in state["binding"]:
        saved, current = state["settings"][name], repr(named[name])
        if saved != current:
            warn(
                f"the run was resumed with {current}, but the checkpoint was written with {saved}; if this change is "
                "not intended, resume with the same arguments."
            )
    _check_weights(run, state)
    # This run has copied reference values from its model. These values are replaced, because the model may have been
    # loaded from the checkpoint, with edited weights.
    for name, value in state["reference"].items():
        parameter = run.scope[name]
        run.reference[name] = shard_like(value.to(device=parameter.device, dtype=parameter.dtype), parameter)
    run.step = state["step"]
    # Version 0.2.0 did not save the scores.
    run.scores, run.published_at = dict(state.get("scores", {})), dict(state.get("published_at", {}))
    return {callback: state["callbacks"][name] for name, callback in named.items() if name in state["callbacks"]}


def named_callbacks(run: RunState) -> dict[str, Any]:
    """Return a dict from name to callback. The names are, for example, ``"NormBall.0"`` and ``"NormBall.1"``.

    The number in a name counts the callbacks of the same class.
    """
    names = [type(callback).__name__ for callback in run.callbacks]
    return {f"{name}.{names[:i].count(name)}": c for i, (name, c) in enumerate(zip(names, run.callbacks, strict=True))}
