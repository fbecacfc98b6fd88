"""Compare a penalty with the training loss in the first steps of a run, and warn if the penalty is larger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.errors import warn

# The means are compared after these numbers of steps. Each comparison waits for the device, so there are only three.
_CHECKS = (5, 10, 20)


def exceeds_loss(penalties: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """Return the mean penalty and the mean training loss if the penalty is larger, else None.

    Args:
        penalties: the penalty of each step, as it is added to the loss.
        losses: the training loss of each micro-batch, without the penalty.

    Example:
        >>> exceeds_loss([0.0, 8.0, 10.0], [4.0, 3.0, 2.0])
        (6.0, 3.0)
        >>> exceeds_loss([0.0, 1.0, 1.0], [4.0, 3.0, 2.0])
    """
    if not penalties or not losses:
        return None
    penalty, loss = sum(penalties) / len(penalties), sum(losses) / len(losses)
    return (penalty, loss) if penalty > loss else None


class PenaltyBalance:
    """Record the penalty of one callback and the training loss in the first 20 steps of a run.

    A hook reads the loss that the model returns. If the training loop computes its own loss from the logits, nothing is
    compared.

    Args:
        model: the causal language model that is trained.
        shares: function that returns how many micro-batch losses are added up in one optimizer step
            (:meth:`Host.summed_micro_batches`).
    """

    def __init__(self, model: nn.Module, shares: Callable[[], int]) -> None:
        self._penalties: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._shares = shares
        self._handle: Any = model.register_forward_hook(self._read_loss)

    def __getstate__(self) -> dict[str, Any]:
        # The hook of a copied or unpickled model must do nothing.
        return {"_handle": None}

    def remove(self) -> None:
        """Remove the hook from the model."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def add(self, penalty: Tensor) -> None:
        """Record the penalty of this step, as it is added to the loss."""
        if self._handle is not None:
            self._penalties.append(penalty.detach())

    def after_step(self, advice: str) -> None:
        """Compare the mean penalty with the mean training loss after 5, 10 and 20 steps.

        If the mean penalty is larger, a warning is issued, and later calls do nothing.

        Args:
            advice: what the user can do. The warning ends with this text.
        """
        steps = len(self._penalties)
        if self._handle is None or steps not in _CHECKS:
            return
        means = exceeds_loss([float(value) for value in self._penalties], [float(value) for value in self._losses])
        if means is not None:
            penalty, loss = means
            warn(
                f"the mean penalty ({penalty:.3g}) was larger than the mean training loss ({loss:.3g}) in the first "
                f"{steps} steps, so the edits may not be learned; {advice}."
            )
        if means is not None or steps == _CHECKS[-1]:
            self.remove()

    def _read_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._handle is None or not torch.is_grad_enabled():
            return
        log_probs, mask = getattr(output, "log_probs", None), getattr(output, "label_mask", None)
        loss = getattr(output, "loss", None)
        if log_probs is not None and mask is not None:
            # SFTTrainer computes its loss from these fields.
            self._losses.append(-log_probs.detach().float().sum() / mask.sum().clamp(min=1))
        elif isinstance(loss, Tensor):
            self._losses.append(loss.detach().float() * self._shares())
