"""Measure how far a model's weights are from the weights before the edit: per tensor, and in total."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.fsdp import full_tensor
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import unwrap_model
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, Score

# Number of entries that are converted to double precision at a time. Converting a full embedding would take more memory
# than a training step.
_CHUNK = 2**22


# The key of a report's metadata under which the norms per tensor are stored.
BY_TENSOR = "weight_drift_by_tensor"


@dataclass(frozen=True, kw_only=True)
class TensorDrift:
    """The change of one tensor.

    Args:
        n: number of entries.
        squared_change: sum of the squared changes of all entries.
        squared_norm: sum of the squares of all entries before the edit.
        largest: the largest absolute change of an entry.
        moved: number of entries that changed.
    """

    n: int
    squared_change: float = 0.0
    squared_norm: float = 0.0
    largest: float = 0.0
    moved: int = 0


@torch.no_grad()
def tensor_drift(model: nn.Module, reference_weights: Mapping[str, Tensor] | nn.Module) -> dict[str, TensorDrift]:
    """Measure the change of each parameter in ``reference_weights``.

    Args:
        model: the edited model.
        reference_weights: the unedited model, or a dict from parameter name to the value before the edit
            (``EditRun.reference``).

    Raises:
        EditError: a parameter in ``reference_weights`` is missing in the model or has another shape in the model.
    """
    current: dict[str, Any] = dict(unwrap_model(model).named_parameters())
    if isinstance(reference_weights, nn.Module):
        before = dict(unwrap_model(reference_weights).named_parameters())
    else:
        before = dict(reference_weights)
    drifts = {}
    for name, old in before.items():
        if name not in current or current[name].shape != old.shape:
            own = "no such parameter" if name not in current else f"shape {tuple(current[name].shape)}"
            raise EditError(
                f"reference_weights: the parameter {name!r} has shape {tuple(old.shape)}, but the model has {own}; "
                "pass the unedited weights of the same model."
            )
        drifts[name] = _drift(full_tensor(current[name].detach()).flatten(), full_tensor(old.detach()).flatten())
    return drifts


def _drift(new_entries: Tensor, old_entries: Tensor) -> TensorDrift:
    squared_change, squared_norm, largest, moved = 0.0, 0.0, 0.0, 0
    for new_part, old_part in zip(new_entries.split(_CHUNK), old_entries.split(_CHUNK), strict=True):
        old_part = old_part.to(new_part.device).double()
        change = new_part.double() - old_part
        squared_change += float(change.square().sum())
        squared_norm += float(old_part.square().sum())
        largest = max(largest, float(change.abs().max())) if change.numel() else largest
        moved += int((change != 0).sum())
    return TensorDrift(
        n=new_entries.numel(), squared_change=squared_change, squared_norm=squared_norm, largest=largest, moved=moved
    )


def total_drift(drifts: Mapping[str, TensorDrift]) -> dict[str, Score]:
    """Return the drift of all tensors together.

    Returns:
        Three scores: ``relative`` (Frobenius norm of the change divided by the Frobenius norm of the original
        weights), ``largest`` (the largest absolute change of one entry) and ``moved`` (fraction of entries that
        changed). ``n`` is the number of entries. The scores have no confidence interval, because all entries are
        measured.
    """
    n = sum(drift.n for drift in drifts.values())
    if n == 0:
        return dict.fromkeys(("relative", "largest", "moved"), NO_SCORE)
    squared_norm = sum(drift.squared_norm for drift in drifts.values())
    relative = (sum(d.squared_change for d in drifts.values()) / squared_norm) ** 0.5 if squared_norm else None
    largest = max(drift.largest for drift in drifts.values())
    moved = sum(drift.moved for drift in drifts.values())
    return {"relative": Score(relative, n=n), "largest": Score(largest, n=n), "moved": Score(moved / n, n=n)}


def norms_by_tensor(drifts: Mapping[str, TensorDrift]) -> dict[str, dict[str, float]]:
    """Return two norms for each tensor that changed: the norm of the change, and the norm of the old values.

    The keys of the norms are "change" and "before". A tensor with an infinite or NaN norm is left out, because JSON has
    no such numbers.
    """
    return {
        name: {"change": drift.squared_change**0.5, "before": drift.squared_norm**0.5}
        for name, drift in drifts.items()
        if drift.moved and math.isfinite(drift.squared_change) and math.isfinite(drift.squared_norm)
    }
