"""The metadata of a report, which make it possible to repeat the evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch
import transformers
from torch import nn

from kedit_train.data import Edit
from kedit_train.evaluation.scoring.probe_results import ProbeResult
from kedit_train.version import __version__

# Two logits are a near tie if they differ by less than _ULPS times the machine epsilon of the dtype. In fp32, the order
# of summation can change a logit by more than that, so the bound has a minimum.
_ULPS, _MINIMUM = 16, 6e-5


def report_metadata(
    model: nn.Module,
    edits: Sequence[Edit],
    n: int,
    results: Sequence[ProbeResult],
    settings: dict[str, Any],
    *,
    against_unedited: bool,
) -> dict[str, Any]:
    """Return the metadata of an evaluation: data, model, settings, versions, date and two counts.

    The count ``unscored`` is the number of probes without a score, per metric. The count ``near_ties`` is the number
    of answers that another batch size or device may change.

    Args:
        model: the evaluated model.
        edits: all edits of the data.
        n: number of edits that were evaluated.
        results: the results of all probes.
        settings: the settings of the evaluation.
        against_unedited: True if locality is the fraction of answers that equal the unedited model's answer.
    """
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
            "kedit_train": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "interval": "95 %, bootstrap over edits, 1000 resamples",
        "unscored": _count_unscored(results, against_unedited),
        "near_ties": count_near_ties(model, results),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def count_near_ties(model: nn.Module, results: Sequence[ProbeResult]) -> int:
    """Count the answers that another batch size or device may change, because two logits are almost equal.

    An answer is counted if, for at least one token, the two largest logits differ by less than a bound. The bound is 16
    times the machine epsilon of the dtype in which the model computes. If this value is below 6e-5, the bound is 6e-5.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    device = parameter.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype
    bound = max(_ULPS * torch.finfo(dtype).eps, _MINIMUM)
    return sum(result.margin is not None and result.margin < bound for result in results)


def _data_hash(edits: Sequence[Edit]) -> str:
    own = getattr(edits, "hash", None)
    if isinstance(own, str):
        return own
    text = json.dumps([asdict(edit) for edit in edits], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _count_unscored(results: Sequence[ProbeResult], against_unedited: bool) -> dict[str, int]:
    """Count the probes without a score, per metric."""
    counts: dict[str, int] = {}
    for result in results:
        scored = result.question in ("fluency", "retrieval") or (against_unedited and result.question == "locality")
        if result.right is None and not scored:
            counts[result.question] = counts.get(result.question, 0) + 1
    return counts
