"""Merging several deltas of one base model (sum, TIES, DARE), and making one delta sparser (RECT)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kedit_train.arguments import check_arguments, one_of, within
from kedit_train.compatibility import rescaled_dare
from kedit_train.delta.edit_delta import EditDelta
from kedit_train.delta.task_vector import TaskVector, as_vector, check_same_base
from kedit_train.errors import EditError, reported_by
from kedit_train.optional import require

Method = Literal["linear", "ties", "dare"]


@torch.no_grad()
def merge(
    deltas: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    density: float = 0.5,
    seed: int = 0,
) -> TaskVector[EditDelta]:
    """Merge deltas (or task vectors) of one base model, tensor by tensor.

    If a delta does not change a tensor, its difference for this tensor is zero. TIES and DARE use the implementations
    of PEFT.

    Args:
        deltas: at least one delta or task vector.
        weights: the factor of each delta. Default: 1 for each.
        method: ``linear`` returns the weighted sum. ``ties`` merges each tensor in three steps. First, it keeps the
            largest entries of each delta (by absolute value). Then it adds up the kept values of all deltas, entry by
            entry and without ``weights``, and drops the values whose sign differs from the sign of the sum. Last, it
            multiplies each remaining value by the weight of its delta, and averages the products.
            ``dare`` keeps entries at random, divides the kept entries by ``density``, and returns the weighted sum.
        density: fraction of the entries that ``ties`` and ``dare`` keep, in (0, 1]. ``linear`` ignores it.
        seed: seed of the random draw of ``dare``.

    Returns:
        The merged task vector. Its method :meth:`~TaskVector.delta` converts it to a delta.

    Raises:
        EditError: the base models differ, an argument is out of range, or PEFT is not installed (for ``ties`` and
            ``dare``).

    References:
        linear: "Editing Models with Task Arithmetic", arXiv 2212.04089. TIES: "TIES-Merging: Resolving Interference
        When Merging Models", arXiv 2306.01708. DARE: "Language Models are Super Mario", arXiv 2311.03099.

    Example:
        >>> import torch
        >>> from kedit_train import EditDelta
        >>> from kedit_train.delta import merge
        >>> base = {"w": torch.zeros(3)}
        >>> a = EditDelta.between(base, {"w": torch.tensor([1.0, 0.0, 2.0])})
        >>> b = EditDelta.between(base, {"w": torch.tensor([0.0, 4.0, -2.0])})
        >>> merge([a, b], weights=[1.0, 0.5]).delta().apply(base)
        {'w': tensor([1., 2., 1.])}
    """
    check_arguments("merge", method=(method, one_of(get_args(Method))), density=(density, within("(0, 1]")))
    with reported_by("merge"):
        vectors = [as_vector(delta) for delta in deltas]
        factors = [1.0] * len(vectors) if weights is None else [float(weight) for weight in weights]
        if not vectors or len(factors) != len(vectors):
            raise EditError(
                f"expected at least one delta, and one weight per delta, got {len(vectors)} deltas and {len(factors)} "
                "weights; pass at least one delta, and one weight for each delta or no weights."
            )
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
    return vectors[0].with_differences(merged, *vectors[1:])


@torch.no_grad()
def sparsify(delta: Any, *, density: float = 0.4) -> TaskVector[EditDelta]:
    """In each tensor, keep the entries with the largest relative change ``|difference / base|`` (RECT).

    All other entries get the value of the base model.

    Args:
        delta: a delta or a task vector.
        density: fraction of the entries of each tensor to keep, in (0, 1]. A changed entry with the base value 0 has an
            infinite relative change. Such entries are kept first.

    Raises:
        EditError: ``density`` is out of range.

    References:
        "Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue", arXiv
        2401.04700.

    Example:
        >>> import torch
        >>> from kedit_train import EditDelta
        >>> from kedit_train.delta import sparsify
        >>> base = {"w": torch.tensor([1.0, 1.0, 10.0, 10.0])}
        >>> delta = EditDelta.between(base, {"w": torch.tensor([2.0, 1.1, 11.0, 16.0])})
        >>> sparsify(delta, density=0.5).delta().apply(base)
        {'w': tensor([ 2.,  1., 10., 16.])}
    """
    check_arguments("sparsify", density=(density, within("(0, 1]")))
    vector, sparse = as_vector(delta), {}
    for name, difference in vector.differences.items():
        ratio = (difference.abs() / vector.base[name].values.abs()).nan_to_num(nan=0.0, posinf=torch.inf).reshape(-1)
        count = max(1, int(density * ratio.numel()))
        mask = torch.zeros_like(ratio, dtype=torch.bool).index_fill_(0, ratio.topk(count).indices, True)
        sparse[name] = torch.where(mask.view_as(difference), difference, 0.0)
    return vector.with_differences(sparse)


def _parts(name: str, vectors: Sequence[TaskVector[Any]]) -> list[Tensor]:
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
    return {"ties": merge_utils.ties, "dare": rescaled_dare(merge_utils.dare_linear)}[method]
