"""Models that DistributedDataParallel (DDP) replicates: whether it waits for gradients that will never come."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kedit_train.core.processes import is_distributed
from kedit_train.errors import EditError


def watch_replicas(model: nn.Module) -> list[Any]:
    """Refuse, at the first forward pass, parameters that were frozen after DDP had wrapped the model.

    DDP waits for a gradient of every parameter that was trainable then, so its second forward pass would fail with an
    error about unused outputs. Where it looks for unused parameters, freezing late does no harm.

    Args:
        model: what DDP calls, directly or in a module around it; or the wrapper itself.

    Returns:
        Handles of the hooks, each with ``remove()``; none for a single process.
    """
    if not is_distributed():
        return []
    return [model.register_forward_pre_hook(_Check())]


class _Check:
    """Looks until it has seen the wrapper, which a model knows only while that calls it."""

    seen = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.seen:
            return
        active: Any = DistributedDataParallel._active_ddp_module
        wrapper: Any = module if isinstance(module, DistributedDataParallel) else active
        if wrapper is None:
            return
        self.seen = True
        if wrapper.find_unused_parameters or wrapper.static_graph:
            return
        # Its own list of parameters holds frozen ones as well; what it waits for is known by number only.
        awaited = wrapper._get_ddp_logging_data()["num_parameter_tensors"]
        if awaited > sum(p.requires_grad for p in wrapper._module_parameters):
            raise EditError(
                "DistributedDataParallel had wrapped the model before the edit froze what is out of scope, and waits "
                "for its gradients; begin the edit first (callbacks= of the trainer, editing() before fabric.setup or "
                "DDP), or set find_unused_parameters=True"
            )
