"""Follow what a training strategy has done to the model by the time training starts: sharding and dtype conversion."""

from __future__ import annotations

from kedit_train.core.fsdp import check_precision, reshard, shard_like
from kedit_train.core.full_precision import FullPrecision
from kedit_train.core.processes import is_distributed
from kedit_train.core.state import RunState
from kedit_train.errors import EditError


def follow_strategy(run: RunState) -> None:
    """Look the scoped parameters up again, since FSDP2 has replaced them by DTensors of the same name and shape.

    Raises:
        EditError: the strategy flattened, sliced or renamed a parameter (FSDP1, DeepSpeed), or the host cannot keep
            constraints for another reason.
    """
    reshard(run.root)
    shapes = {name: run.shapes[name] for name in run.scope}
    current = dict(run.model.named_parameters())
    lost = next((name for name in shapes if name not in current or current[name].shape != shapes[name]), None)
    reason = run.host.unsupported_reason()
    if lost is not None:
        reason = f"it flattened, sliced or renamed the parameter {lost} of shape {tuple(shapes[lost])}"
    if reason is not None:
        raise EditError(
            f"constraints would not hold under this training strategy: {reason}; use DDP, FSDP2 (fully_shard) or a "
            "single process."
        )
    run.scope = {name: current[name] for name in shapes}
    check_precision(run.scope.values(), widened=run.masters is not None and bool(run.masters.dtypes))
    run.reference = {name: shard_like(value, run.scope[name]) for name, value in run.reference.items()}


def follow_dtype(run: RunState) -> None:
    """Follow a conversion of the model to another dtype after the scope was set, as Lightning's "bf16-true" does.

    The reference is converted too, and the fp32 masters are created again.
    """
    converted = {n: p.dtype for n, p in run.scope.items() if n in run.reference and p.dtype != run.reference[n].dtype}
    if not converted:
        return
    if run.full_precision and is_distributed():
        raise EditError(
            "full_precision=True needs the parameters in fp32 before the model is distributed, but the trainer "
            "converted them to half precision afterwards; load the model in half precision and set the trainer's "
            "precision to 32-true, or pass full_precision=False.",
            component="ParameterScope",
        )
    run.reference |= {name: run.reference[name].to(dtype) for name, dtype in converted.items()}
    if run.full_precision:
        if run.masters is not None:
            # The conversion has overwritten the masters, so their hooks must not stay under the new ones.
            run.masters.remove()
        run.masters = FullPrecision(run.root, run.scope)
        run.reference = {name: value.to(run.scope[name].dtype) for name, value in run.reference.items()}
