"""Detect an optimizer that has loaded the state of another kind of optimizer from a checkpoint."""

from __future__ import annotations

from torch.optim import Optimizer

from kedit_train.core.state import RunState
from kedit_train.errors import EditError

# load_state_dict() may add this argument to ``optimizer.defaults``, but not to the parameter groups.
_ADDED = {"differentiable"}


def check_loaded_optimizer(run: RunState, optimizer: Optimizer) -> None:
    """Raise an error if the optimizer of a resumed run has loaded the state of another kind of optimizer.

    Each parameter group has a value for every argument of its optimizer. ``load_state_dict`` replaces these values by
    those of the checkpoint. If the checkpoint is from another kind of optimizer, some of the values are then missing.

    Raises:
        EditError: a parameter group has no value for an argument of the optimizer.
    """
    if not run.host.resumed:
        return
    needed = optimizer.defaults.keys() - _ADDED
    missing = next((sorted(needed - group.keys()) for group in optimizer.param_groups if needed - group.keys()), None)
    if missing is not None:
        raise EditError(
            f"the checkpoint was written with another optimizer than {type(optimizer).__name__}: the loaded state "
            f"has no value for {', '.join(missing)}; resume with the optimizer of the interrupted run (in transformers "
            "and TRL, the argument optim)."
        )
