"""Check that the gradient of the loss reaches the parameters in scope."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.core.scope.experts import experts_per_block
from kedit_train.core.state import RunState
from kedit_train.errors import EditError


def check_gradients(run: RunState, penalized: bool = False) -> None:
    """Raise an error if no parameter in scope has a gradient just before an optimizer step.

    If no parameter has a gradient at the first step, the loss does not depend on the scope, so training would change
    nothing. A sharded scope is checked at every step, any other scope only at the first step.

    Without a penalty on the weights, gradients that are all zero are allowed, because the model may already give the
    new answers. With a penalty, they count as missing: the penalty gives each parameter a gradient even if the loss
    does not depend on the scope, and this gradient is zero at the first step. Even with a penalty, zeros are allowed if
    the token loss ignores learned tokens, or if the trainer computes its own loss.

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
        more = (
            f" or any other of the {len(scope)} parameters in scope" if len(scope) > 1 else ", the parameter in scope"
        )
        raise EditError(
            f"no gradient has reached {name}{more}, so training would change nothing; call backward() before the "
            "step, and look for detach(), torch.no_grad() or a quantized layer without gradients between the scope and "
            "the loss."
        )


def _are_zeros(run: RunState, gradients: list[Tensor]) -> bool:
    # A token loss that ignores learned tokens, or the trainer's own loss, may have a gradient of zeros.
    if any("token_clip" in callback.provides() for callback in run.callbacks) or run.host.loss_unsupported_reason():
        return False
    # Sharded gradients are not read.
    return not any(isinstance(g, DTensor) or bool(g.any()) for g in gradients)
