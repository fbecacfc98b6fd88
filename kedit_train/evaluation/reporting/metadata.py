"""What has to be known to repeat an evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from torch import nn

from kedit_train.data import Edit
from kedit_train.evaluation.scoring.metrics import ProbeResult

# Two logits closer than this many units in the last place of the dtype are within its rounding; in fp32 it is the order
# of long sums that tells, not the last place.
_ULPS, _FLOOR = 16, 6e-5


def meta_of(
    model: nn.Module,
    edits: Sequence[Edit],
    n: int,
    results: Sequence[ProbeResult],
    settings: dict[str, Any],
    *,
    against_before: bool,
) -> dict[str, Any]:
    """Data, model, settings, versions, date; and what cannot be read from a score: ``unscored`` and ``near_ties``."""
    config = getattr(model, "config", None)
    return {
        "n_edits": n,
        "n_edits_in_data": len(edits),
        "n_probes": len(results),
        "data_name": getattr(edits, "name", None) or "edits",
        "data_hash": _data_hash(edits),
        "model": getattr(config, "name_or_path", "") or type(model).__name__,
        "settings": settings,
        "versions": {
            "kedit_train": _own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "interval": "95 %, bootstrap over edits, 1000 resamples",
        "unscored": _unscored(results, against_before),
        "near_ties": near_ties(model, results),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def near_ties(model: nn.Module, results: Sequence[ProbeResult]) -> int:
    """Answers in which two tokens were as good as equal: another batch size or device may choose the other one.

    As good as equal are logits within 16 units in the last place of the dtype in which the model computes (at 1), or
    6e-5 where that is more.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    bound = max(_ULPS * torch.finfo(dtype).eps, _FLOOR)
    return sum(result.margin is not None and result.margin < bound for result in results)


def _data_hash(edits: Sequence[Edit]) -> str:
    own = getattr(edits, "hash", None)
    if isinstance(own, str):
        return own
    text = json.dumps([asdict(edit) for edit in edits], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _own_version() -> str:
    try:
        return version("kedit-train")
    except PackageNotFoundError:
        return "not installed (run from a checkout)"


def _unscored(results: Sequence[ProbeResult], against_before: bool) -> dict[str, int]:
    """Probes without an accepted answer, per question: they have no generated score (locality against before has)."""
    found: dict[str, int] = {}
    for result in results:
        if (
            result.right is None
            and result.question != "fluency"
            and not (against_before and result.question == "locality")
        ):
            found[result.question] = found.get(result.question, 0) + 1
    return found
