"""``weight_drift``: measure how far a model's weights are from the weights before the edit."""

from __future__ import annotations

from collections.abc import Mapping
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


@torch.no_grad()
def weight_drift(model: nn.Module, reference_weights: Mapping[str, Tensor] | nn.Module) -> dict[str, Score]:
    """Measure the distance of a model from its weights before the edit.

    Args:
        model: the edited model.
        reference_weights: the unedited model, or a dict from parameter name to the value before the edit
            (``EditRun.reference``).

    Returns:
        Three scores: ``relative`` (Frobenius norm of the change divided by the Frobenius norm of the original
        weights), ``largest`` (the largest absolute change of one entry) and ``moved`` (fraction of entries that
        changed). ``n`` is the number of entries. The scores have no interval, because all entries are measured.

    Raises:
        EditError: a parameter in ``reference_weights`` is missing in the model or has another shape in the model.
    """
    current: dict[str, Any] = dict(unwrap_model(model).named_parameters())
    if isinstance(reference_weights, nn.Module):
        before = dict(unwrap_model(reference_weights).named_parameters())
    else:
        before = dict(reference_weights)
    squared_change, squared_norm, largest, changed, n = 0.0, 0.0, 0.0, 0, 0
    for name, old in before.items():
        if name not in current or current[name].shape != old.shape:
            own = "no such parameter" if name not in current else f"shape {tuple(current[name].shape)}"
            raise EditError(
                f"reference_weights: {name} has shape {tuple(old.shape)}, but the model has {own}; "
                "pass the unedited weights of the same model."
            )
        new_entries, old_entries = full_tensor(current[name].detach()).flatten(), full_tensor(old.detach()).flatten()
        n += new_entries.numel()
        for new_part, old_part in zip(new_entries.split(_CHUNK), old_entries.split(_CHUNK), strict=True):
            old_part = old_part.to(new_part.device).double()
            change = new_part.double() - old_part
            squared_change += float(change.square().sum())
            squared_norm += float(old_part.square().sum())
            largest = max(largest, float(change.abs().max())) if change.numel() else largest
            changed += int((change != 0).sum())
    if n == 0:
        return dict.fromkeys(("relative", "largest", "moved"), NO_SCORE)
    relative = (squared_change / squared_norm) ** 0.5 if squared_norm else None
    return {"relative": Score(relative, n=n), "largest": Score(largest, n=n), "moved": Score(changed / n, n=n)}
