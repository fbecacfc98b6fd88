"""Check that DistributedDataParallel (DDP) does not wait for gradients of frozen parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kedit_train.core.processes import is_distributed
from kedit_train.errors import EditError


def check_ddp_at_first_forward(model: nn.Module) -> list[Any]:
    """Raise an error at the first forward pass if parameters were frozen after DDP had wrapped the model.

    DDP waits for a gradient of every parameter that was trainable when DDP wrapped the model. If some of these
    parameters are frozen later, the second forward pass would fail with an error about unused parameters. With
    ``find_unused_parameters=True``, DDP does not wait for gradients of frozen parameters, and no error is raised.

    Args:
        model: the DDP wrapper, the module that it wraps, or a submodule of the wrapped module.

    Returns:
        The handles of the hooks, each with ``remove()``; an empty list for a single process.
    """
    return [model.register_forward_pre_hook(_FirstForwardCheck())] if is_distributed() else []


class _FirstForwardCheck:
    """Check the DDP wrapper once, in the first forward pass.

    Outside of a forward pass, a wrapped model cannot find its DDP wrapper.
    """

    done = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.done:
            return
        active: Any = DistributedDataParallel._active_ddp_module
        wrapper: Any = module if isinstance(module, DistributedDataParallel) else active
        if wrapper is None:
            return
        self.done = True
        if wrapper.find_unused_parameters or wrapper.static_graph:
            return
        # DDP's list of parameters also contains frozen parameters. Only the number of awaited parameters is known.
        awaited = wrapper._get_ddp_logging_data()["num_parameter_tensors"]
        if awaited > sum(p.requires_grad for p in wrapper._module_parameters):
            raise EditError(
                "DistributedDataParallel wrapped the model before the edit began, and waits for gradients of "
                "parameters that the edit has frozen; pass the callbacks to the trainer, call editing() before "
                "fabric.setup() or DistributedDataParallel(), or set find_unused_parameters=True."
            )
