"""MeanOverEdits: a torchmetrics metric with a bootstrap interval over edits.

This file imports torchmetrics. Therefore kedit-train imports the file only when ``MeanOverEdits`` is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kedit_train.evaluation.scoring.bootstrap import RESAMPLES, Score, cluster_bootstrap, none_if_nan, sums_per_edit


class MeanOverEdits(Metric):
    """The mean of values that are grouped by edit, with a bootstrap interval over edits.

    The metric states are one sum and one count per edit. With several processes, the states of all processes are added,
    so the result is the same as on one process. As in any ``torchmetrics.Metric``, the states are synchronized by
    ``compute``, or by ``self.log`` of a LightningModule.

    Args:
        n_edits: total number of edits on all processes. Each edit has a number from 0 to ``n_edits - 1``.
        seed: seed of the bootstrap.
        resamples: number of resamples of the bootstrap.
        kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> from kedit_train.evaluation import MeanOverEdits
        >>> mean = MeanOverEdits(3)
        >>> mean.update(edits=[0, 1, 1, 2], values=[True, False, False, True])
        >>> mean.score()
        Score(value=0.5, n=4, low=0.0, high=1.0)
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, n_edits: int, *, seed: int = 0, resamples: int = RESAMPLES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self.resamples = resamples
        self.add_state("total", default=torch.zeros(n_edits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros(n_edits, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, edits: Sequence[int], values: Sequence[float | bool]) -> None:
        """Add values. ``values[i]`` belongs to the edit with the number ``edits[i]``.

        A process without probes passes two empty lists.
        """
        total, count = sums_per_edit(edits, values, n_edits=len(self.total))
        self.total += total.to(self.total.device)
        self.count += count.to(self.count.device)

    def compute(self) -> Tensor:
        """Return ``[value, n, low, high]`` in fp64. An entry that cannot be computed is NaN."""
        bounds = cluster_bootstrap(self.total[:, None], self.count[:, None], seed=self.seed, resamples=self.resamples)
        n = self.count.sum()
        return torch.stack([(self.total.sum() / n).cpu(), n.double().cpu(), *bounds[:, 0]])

    def score(self) -> Score:
        """Return the result of :meth:`compute` as a :class:`Score`."""
        value, n, low, high = self.compute().tolist()
        return Score(none_if_nan(value), n=int(n), low=none_if_nan(low), high=none_if_nan(high))
