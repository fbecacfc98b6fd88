"""What a training strategy has made of the model by the time training starts: sharded, converted, or out of reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedit_train.core.fsdp import check_precision, placed_like, reshard
from kedit_train.core.full_precision import FullPrecision
from kedit_train.core.processes import is_distributed
from kedit_train.errors import EditError

if TYPE_CHECKING:
    from kedit_train.core.run import EditRun


def follow_strategy(run: EditRun) -> None:
    """Find the scope again: FSDP2 has replaced its parameters by DTensors of the same name and shape.

    One that changes names or shapes (FSDP1 and DeepSpeed flatten and slice) would leave the constraints without the
    weights that they hold.
    """
    reshard(run.root)
    shapes = {name: run.shapes[name] for name in run.scope}
    now = dict(run.model.named_parameters())
    lost = next((name for name in shapes if name not in now or now[name].shape != shapes[name]), None)
    reason = run.host.refused()
    if lost is not None:
        reason = f"the parameter {lost} of shape {tuple(shapes[lost])} has been flattened, sliced or renamed"
    if reason is not None:
        raise EditError(
            f"this strategy would void the edit's constraints: {reason}; use DDP, FSDP2 (fully_shard) or one process"
        )
    run.scope = {name: now[name] for name in shapes}
    check_precision(run.scope.values(), widened=run.masters is not None and bool(run.masters.dtypes))
    run.reference = {name: placed_like(value, run.scope[name]) for name, value in run.reference.items()}


def follow_dtype(run: EditRun) -> None:
    """A strategy may have converted the model (Lightning's bf16-true) since the scope was set."""
    converted = {n: p.dtype for n, p in run.scope.items() if n in run.reference and p.dtype != run.reference[n].dtype}
    if not converted:
        return
    if run.full_precision and is_distributed():
        raise EditError(
            "the scope would be trained in fp32, but the model was converted to half precision after several processes "
            "had been wired up; load the model in half precision and leave the trainer's precision at 32-true, or give "
            "ParameterScope full_precision=False"
        )
    run.reference |= {name: run.reference[name].to(dtype) for name, dtype in converted.items()}
    if run.full_precision:
        if run.masters is not None:
            # The strategy has undone what it did; its casts must not be stacked under new ones.
            run.masters.remove()
        run.masters = FullPrecision(run.root, run.scope)
        run.reference = {name: value.to(run.scope[name].dtype) for name, value in run.reference.items()}
