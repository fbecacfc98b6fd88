"""Several deltas of one base as one: their sum, TIES, DARE; and the sparser form of one, RECT."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kedit_train.delta.task_vector import TaskVector, as_vector, check_same_base
from kedit_train.errors import EditError
from kedit_train.optional import require

Method = Literal["linear", "ties", "dare"]


@torch.no_grad()
def merge(
    deltas: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    method: Method = "linear",
    density: float = 0.5,
    seed: int = 0,
) -> TaskVector:
    """Merge deltas (or task vectors) of one base, tensor by tensor; TIES and DARE are PEFT's implementations.

    ``linear``: the weighted sum (arXiv 2212.04089). ``ties``: of each delta the share ``density`` of largest entries of
    every tensor, then the mean of those entries that have the sign of the majority by mass ("TIES-Merging", arXiv
    2306.01708). ``dare``: entries dropped at random until the share ``density`` is left, those scaled by
    ``1 / density``, then the weighted sum ("Language Models are Super Mario", arXiv 2311.03099).

    A delta that does not change a tensor takes part with zeros there.

    Args:
        deltas: at least one.
        weights: one for each; by default 1.
        density: share of entries kept, in (0, 1]; linear does not use it.
        seed: of what DARE drops.

    Raises:
        EditError: different bases, arguments out of range, or TIES or DARE without PEFT.
    """
    vectors = [as_vector(delta) for delta in deltas]
    factors = [1.0] * len(vectors) if weights is None else [float(weight) for weight in weights]
    if not vectors or len(factors) != len(vectors):
        raise EditError(f"merge: {len(vectors)} deltas and {len(factors)} weights; give one weight for each delta")
    if method not in get_args(Method) or not 0.0 < density <= 1.0:
        raise EditError(f"merge: method={method!r}, density={density}: expected {get_args(Method)} and (0, 1]")
    for vector in vectors[1:]:
        check_same_base(vectors[0], vector)
    implementation = _implementation(method)
    merged = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The density .* no pruning will be performed")
        torch.manual_seed(seed)
        for name in sorted({name for vector in vectors for name in vector.differences}):
            parts = _parts(name, vectors)
            merged[name] = implementation(parts, torch.tensor(factors, dtype=parts[0].dtype), density)
    return vectors[0].combined(merged, *vectors[1:])


@torch.no_grad()
def sparsify(delta: Any, keep: float = 0.4) -> TaskVector:
    """Keep of each tensor the share ``keep`` of entries with the largest relative change, ``|difference / base|``.

    RECT ("Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue", arXiv
    2401.04700). The share is taken of the entries of the whole tensor; a change of an entry that was 0 counts as
    infinitely large.

    Args:
        keep: in (0, 1].
    """
    if not 0.0 < keep <= 1.0:
        raise EditError(f"sparsify: keep={keep} is no share in (0, 1]")
    vector, kept = as_vector(delta), {}
    for name, difference in vector.differences.items():
        ratio = (difference.abs() / vector.base[name].abs()).nan_to_num(nan=0.0, posinf=torch.inf).reshape(-1)
        count = max(1, int(keep * ratio.numel()))
        mask = torch.zeros_like(ratio, dtype=torch.bool).index_fill_(0, ratio.topk(count).indices, True)
        kept[name] = torch.where(mask.view_as(difference), difference, 0.0)
    return vector.combined(kept)


def _parts(name: str, vectors: Sequence[TaskVector]) -> list[Tensor]:
    zeros = torch.zeros_like(next(v.differences[name] for v in vectors if name in v.differences))
    return [vector.differences.get(name, zeros) for vector in vectors]


def _weighted_sum(parts: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total += weight * part
    return total


def _implementation(method: Method) -> Any:
    if method == "linear":
        return _weighted_sum
    with require("peft"):
        from peft.utils import merge_utils
    return {"ties": merge_utils.ties, "dare": merge_utils.dare_linear}[method]
