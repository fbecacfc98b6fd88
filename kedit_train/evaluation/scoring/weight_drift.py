"""How far the weights are from where they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.fsdp import full_tensor
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import unwrapped
from kedit_train.evaluation.scoring.bootstrap import Score

# Entries in double precision at a time: an embedding as a whole would take more memory than the step that trained it.
_CHUNK = 2**22


@torch.no_grad()
def weight_drift(model: nn.Module, reference: Mapping[str, Tensor] | nn.Module) -> dict[str, Score]:
    """Distance of a model from its weights before the edit.

    Args:
        reference: the unedited model, or name -> value before the edit for the parameters that were in scope
            (``EditRun.reference``).

    Returns:
        ``relative`` (Frobenius norm of the change over that of the weights), ``largest`` (change of one entry) and
        ``moved`` (share of entries that differ); ``n`` is the number of entries. Nothing is sampled here, so there is
        no interval.

    Raises:
        EditError: a name or shape that the model does not have.
    """
    own: dict[str, Any] = dict(unwrapped(model).named_parameters())
    before = dict(unwrapped(reference).named_parameters()) if isinstance(reference, nn.Module) else dict(reference)
    moved, size, largest, differ, n = 0.0, 0.0, 0.0, 0, 0
    for name, old in before.items():
        if name not in own or own[name].shape != old.shape:
            found = "no such parameter" if name not in own else f"one of shape {tuple(own[name].shape)}"
            raise EditError(
                f"reference: {name} has shape {tuple(old.shape)} and this model has {found}: give the weights of the "
                "very model before its edit"
            )
        now, before_it = full_tensor(own[name].detach()).flatten(), full_tensor(old.detach()).flatten()
        n += now.numel()
        for part, was in zip(now.split(_CHUNK), before_it.split(_CHUNK), strict=True):
            was = was.to(part.device).double()
            change = part.double() - was
            moved += float(change.square().sum())
            size += float(was.square().sum())
            largest = max(largest, float(change.abs().max())) if change.numel() else largest
            differ += int((change != 0).sum())
    if n == 0:
        return {name: Score(None, 0) for name in ("relative", "largest", "moved")}
    relative = (moved / size) ** 0.5 if size else None
    return {"relative": Score(relative, n), "largest": Score(largest, n), "moved": Score(differ / n, n)}
