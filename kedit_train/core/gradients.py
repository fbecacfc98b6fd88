"""Check that the gradient of the loss reaches the parameters in scope."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.core.scope.experts import experts_per_block
from kedit_train.core.state import RunState
from kedit_train.errors import EditError


def check_gradients(run: RunState, penalized: bool = False) -> None:
    """Raise an error if no parameter in scope has a gradient just before an optimizer step.

    Such a step changes nothing. If it is the first step, the loss does not depend on the scope, so no later step would
    change anything either. At a later step, only a sharded scope is checked.

    A gradient of zeros is allowed: the model may already give the new answers. However, a penalty on the weights gives
    each parameter a gradient of zeros at the first step, whether or not the loss has a gradient. With a penalty, zeros
    are therefore an error, except with a token loss that ignores learned tokens or in a trainer with its own loss.

    Experts are not checked, because the tokens of a batch may all be routed to other experts.

    FSDP2 transfers gradients to the sharded parameters only if the loss is computed from outputs of sharded modules.
    Otherwise the gradients stay on the gathered copies of the parameters, and no optimizer updates these copies.

    Args:
        run: the run.
        penalized: whether the gradients contain those of a penalty.

    Raises:
        EditError: no parameter in scope has a gradient.
    """
    scope = run.scope
    gradients = [p.grad for p in scope.values() if p.grad is not None]
    if not scope or (gradients and (run.step or not penalized or not _are_zeros(run, gradients))):
        return
    if not gradients and any(isinstance(p, DTensor) for p in scope.values()):
        raise EditError(
            "no gradient has reached the sharded parameters in scope, so this optimizer step would change nothing; "
            "apply fully_shard to the module that the training loop calls, and compute the loss from the output of "
            "that module."
        )
    if run.step == 0 and not experts_per_block(scope):
        name = next(iter(scope))
        more = f" or {len(scope) - 1} more parameters in scope" if len(scope) > 1 else ", the parameter in scope"
        raise EditError(
            f"no gradient has reached {name}{more}, so training would change nothing; call backward() before the "
            "step, and look for detach(), torch.no_grad() or a quantized layer without gradients between the scope and "
            "the loss."
        )


def _are_zeros(run: RunState, gradients: list[Tensor]) -> bool:
    """Return True if all gradients are zero, and no token loss and no loss of the trainer can be the reason."""
    if any("token_clip" in callback.provides() for callback in run.callbacks) or run.host.loss_unsupported_reason():
        return False
    return not any(isinstance(g, DTensor) or bool(g.any()) for g in gradients)
