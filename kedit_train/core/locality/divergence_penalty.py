"""A penalty on the divergence from the model before the edit. Another callback may change the penalty's weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# A divergence is measured on given texts (KLLocality), on the training batch itself (BatchAnchor), or on the outputs
# for given inputs (OutputAnchor).
Measured = Literal["texts", "batch", "outputs"]
# Every callback that adds such a penalty provides this name, so that other callbacks can require a penalty.
CAPABILITY = "divergence_penalty"


class DivergencePenalty:
    """Contains the weight of a divergence penalty, and the measured divergence since the last call of :meth:`take`.

    Two callbacks may share this object. The callback that adds the penalty reads ``weight`` in every step and passes
    its measurements to :meth:`observe`. A callback that adapts the weight sets ``adapted`` to True, reads the
    measurements with :meth:`take` and writes ``weight``.

    Args:
        measured_on: where the divergence is measured: "texts", "batch" or "outputs".
        weight: the weight at the start of the run.

    Attributes:
        weight: factor of the mean divergence per token in the training loss.
        adapted: whether a callback changes the weight during training.
    """

    def __init__(self, measured_on: Measured, weight: float) -> None:
        self.measured_on = measured_on
        self.weight = weight
        self.adapted: bool = False
        self._sum, self._tokens = torch.zeros(()), 0

    def observe(self, divergence: Tensor) -> None:
        """Record the divergence of N tokens, [N] in nats, before it is multiplied by ``weight``.

        :class:`OutputAnchor` passes the distances of N outputs instead, [N] in the unit of its distance.
        """
        if self.adapted:
            self._sum = self._sum.to(divergence.device) + divergence.detach().sum(dtype=torch.float32)
            self._tokens += divergence.numel()

    def take(self) -> tuple[Tensor, int]:
        """Return the summed divergence and the number of tokens that this process has recorded since the last call."""
        taken = self._sum, self._tokens
        self._sum, self._tokens = torch.zeros(()), 0
        return taken
