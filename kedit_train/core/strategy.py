"""Update a run after the training strategy has sharded the model or converted its dtype."""

from __future__ import annotations

from typing import Any

from kedit_train.core.fsdp import check_precision, reshard, shard_like
from kedit_train.core.full_precision import FullPrecision
from kedit_train.core.integrity import uses_deepspeed
from kedit_train.core.processes import check_launcher, is_distributed
from kedit_train.core.state import RunState
from kedit_train.core.zero import ZeroSteps, unsupported_reason, zero_optimizer
from kedit_train.errors import EditError


def follow_strategy(run: RunState) -> None:
    """Look up the parameters in scope again after the training strategy has wrapped the model.

    This is needed for FSDP2, which replaces each parameter by a DTensor with the same name and shape.

    Raises:
        EditError: the strategy is not supported, for example FSDP1 or DeepSpeed ZeRO-3. This error is also raised if
            the optimizer of DeepSpeed does not train a parameter in scope, if FSDP2 shards half-precision parameters
            that must be trained in fp32, or if the launcher started too few processes.
    """
    check_launcher()
    reshard(run.root)
    shapes = {name: run.shapes[name] for name in run.scope}
    current = dict(run.model.named_parameters())
    lost = next((name for name in shapes if name not in current or current[name].shape != shapes[name]), None)
    zero = zero_optimizer(run.scope)
    reason = run.host.unsupported_reason()
    if reason is None and zero is not None:
        reason = unsupported_reason(zero)
    elif reason is None:
        reason = next(filter(None, map(_flattened_by, run.root.parameters())), None)
    if reason is None and lost is not None:
        reason = f"the strategy flattened, sliced or renamed the parameter {lost} of shape {tuple(shapes[lost])}"
    if reason is not None:
        raise EditError(
            f"constraints on the weights cannot be enforced with this training strategy: {reason}; use DDP, FSDP2 "
            "(fully_shard) or a single process."
        )
    run.scope = {name: current[name] for name in shapes}
    untrained = next((n for n, p in run.scope.items() if zero is not None and not hasattr(p, "get_full_hp_grad")), None)
    if untrained is not None:
        raise EditError(
            f"{untrained} is in scope, but the optimizer of DeepSpeed does not train it; create the optimizer from "
            "edit.parameters(), or select other parameters with ParameterScope."
        )
    if zero is not None and run.zero is None:
        run.zero = ZeroSteps(run, zero)
    check_precision(run.scope.values(), widened=run.masters is not None and bool(run.masters.dtypes))
    run.reference = {name: shard_like(value, run.scope[name]) for name, value in run.reference.items()}


def follow_dtype(run: RunState) -> None:
    """Update a run whose model was converted to another dtype, for example by Lightning's "bf16-true".

    The stored reference weights (the values before the edit) get the same dtype. If the scope is trained in fp32, its
    fp32 parameters are created again.

    Raises:
        EditError: the scope is trained in fp32, and the run has several processes.
    """
    converted = {n: p.dtype for n, p in run.scope.items() if n in run.reference and p.dtype != run.reference[n].dtype}
    if not converted:
        return
    if run.full_precision and is_distributed():
        raise EditError(
            "full_precision=True trains fp32 values, but the trainer of this distributed run has converted the model "
            "to half precision and overwritten these values; load the model in half precision yourself and set the "
            "trainer's precision to 32-true (no conversion), or pass full_precision=False.",
            component="ParameterScope",
        )
    run.reference |= {name: run.reference[name].to(dtype) for name, dtype in converted.items()}
    if run.full_precision:
        if run.masters is not None:
            # The conversion has overwritten the fp32 parameters, so these are created again. The old hooks are removed
            # first.
            run.masters.remove()
        run.masters = FullPrecision(run.root, run.scope)
        run.reference = {name: value.to(run.scope[name].dtype) for name, value in run.reference.items()}


def _flattened_by(parameter: Any) -> str | None:
    """Return how the strategy flattens or divides the parameter, or None if it does neither."""
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed ZeRO-3 divides each weight among the processes"
    if uses_deepspeed(parameter):
        return "DeepSpeed updates flattened copies of the weights"
    # FSDP1 sets this attribute on each flattened parameter, even if its wrapper is outside of the run's module.
    return "FSDP1 updates flattened copies of the weights" if hasattr(parameter, "_fsdp_flattened") else None
