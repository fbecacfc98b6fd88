"""Task arithmetic: weight differences in fp32 that can be added, scaled and negated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kedit_train.delta.metadata import library_versions
from kedit_train.delta.tensor_change import Change, change_between
from kedit_train.errors import EditError

D = TypeVar("D")


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base model in a task vector.

    A task vector is made from deltas, which may store only some values of a tensor. All other values are unknown.

    Args:
        values: the whole tensor. Unknown values are 0.
        known: bool mask of the same shape, True where the value is known.
        hash: SHA-256 of the whole tensor in the base model.
        tied: other names of the same tensor.
    """

    values: Tensor
    known: Tensor
    hash: str
    tied: tuple[str, ...]


@dataclass(frozen=True)
class TaskVector(Generic[D]):
    """Weight differences of one or more edits, which can be added, scaled, negated and merged.

    All edits start from the same base model. Arithmetic on an :class:`~kedit_train.EditDelta` (``a + b``, ``-a``,
    ``0.5 * a``) and :func:`~kedit_train.delta.merge` return a task vector. To apply a task vector, convert it with
    :meth:`delta`. This method computes ``base + difference``, rounds the sum once to the dtype of the base model, and
    stores the values before and after the edit. So the resulting delta can be applied and reverted bit for bit. The
    conversion needs no model, because a task vector also stores the base values of all changed weights.

    ``1.0 * a`` may differ from ``a`` by rounding: in fp32, the last bits of ``base + (edited - base)`` and ``edited``
    can be different.

    Args:
        differences: dict from tensor name to the difference of the whole tensor, in fp32 (fp64 for fp64 weights).
        base: dict from tensor name to the tensor of the base model.
        about: description of the base model, as in ``EditDelta.meta["base"]``.
        parents: the ``edits`` metadata of the deltas that were combined.
        delta_type: function that is called with the changes and ``meta=...``, and returns a delta.

    References:
        "Editing Models with Task Arithmetic", arXiv 2212.04089. "Robust fine-tuning of zero-shot models" (WiSE-FT),
        arXiv 2109.01903: ``alpha * a`` gives the base model for ``alpha=0``, the edited model for ``alpha=1``, and
        interpolates between these two models for the values between 0 and 1.

    Example:
        >>> import torch
        >>> from kedit_train import EditDelta
        >>> base = {"w": torch.tensor([1.0, 2.0])}
        >>> a = EditDelta.between(base, {"w": torch.tensor([2.0, 2.0])})
        >>> b = EditDelta.between(base, {"w": torch.tensor([1.0, 4.0])})
        >>> half_of_both = (0.5 * (a + b)).delta()
        >>> half_of_both.apply(base)
        {'w': tensor([1.5000, 3.0000])}
        >>> half_of_both.revert(base)
        {'w': tensor([1., 2.])}
    """

    differences: Mapping[str, Tensor]
    _: KW_ONLY
    base: Mapping[str, BaseTensor]
    about: Mapping[str, Any]
    parents: tuple[Mapping[str, Any], ...] = ()
    delta_type: Callable[..., D]

    @torch.no_grad()
    def delta(self, *, configuration: Any = None) -> D:
        """Convert to a delta: round the edited weights to the base dtype, and store the values before and after.

        Args:
            configuration: a description of how the vector was made, for the metadata. JSON values only.

        Raises:
            EditError: a weight would become infinite or NaN.
        """
        changes: dict[str, Change] = {}
        for name, difference in self.differences.items():
            base = self.base[name]
            moved = (base.values.to(difference.dtype) + difference).to(base.values.dtype)
            edited = torch.where(difference != 0, moved, base.values)
            # torch.isfinite does not support float8, so the values are converted to a wider dtype first.
            if not bool(moved.to(difference.dtype)[difference != 0].isfinite().all()):
                raise EditError(
                    f"tensor {name} must have finite values in {base.values.dtype} after the edit, got infinite or NaN "
                    "values; multiply each delta by a smaller coefficient."
                )
            change = change_between(base.values, edited, base.hash, base.tied, base.known)
            if change is not None:
                changes[name] = change
        count = sum(int(parent.get("count", 0)) for parent in self.parents)
        edits = {"hash": None, "count": count, "parents": [dict(parent) for parent in self.parents]}
        meta = {"base": dict(self.about), "edits": edits, "configuration": configuration, "scores": {}}
        return self.delta_type(changes, meta=meta | {"versions": library_versions()})

    def apply(self, model: Any) -> D:
        """Convert to a delta, apply the delta to ``model`` in place, and return the delta.

        The method ``revert(model)`` of the delta restores the base model.
        """
        delta: Any = self.delta()
        delta.apply(model)
        return delta

    def cosine(self, other: Any) -> float:
        """Return the cosine similarity with another task vector or delta, over all tensors.

        If the norm of one of the two vectors is 0, the result is 0.

        Raises:
            EditError: the two vectors have different base models.
        """
        vector = as_vector(other)
        check_same_base(self, vector)
        shared = self.differences.keys() & vector.differences.keys()
        product = sum(float((self.differences[n].double() * vector.differences[n].double()).sum()) for n in shared)
        lengths = self.norm() * vector.norm()
        return product / lengths if lengths else 0.0

    def norm(self) -> float:
        """Return the Euclidean norm over all tensors."""
        return math.sqrt(sum(float(value.double().square().sum()) for value in self.differences.values()))

    def with_differences(self, differences: Mapping[str, Tensor], *others: TaskVector[D]) -> TaskVector[D]:
        """Return a task vector with the given weight differences.

        The new vector contains the base values and the ``parents`` of this vector and of all ``others``.

        Raises:
            EditError: the vectors have different base models.
        """
        base = dict(self.base)
        for other in others:
            check_same_base(self, other)
            for name, theirs in other.base.items():
                if name in base:
                    values = torch.where(theirs.known, theirs.values, base[name].values)
                    base[name] = BaseTensor(values, theirs.known | base[name].known, theirs.hash, theirs.tied)
                else:
                    base[name] = theirs
        parents = self.parents + tuple(parent for other in others for parent in other.parents)
        return TaskVector(differences, base=base, about=self.about, parents=parents, delta_type=self.delta_type)

    def __add__(self, other: Any) -> TaskVector[D]:
        vector = as_vector(other)
        check_same_base(self, vector)
        total = dict(self.differences)
        for name, value in vector.differences.items():
            total[name] = torch.stack([total[name], value]).sum(0) if name in total else value
        return self.with_differences(total, vector)

    def __sub__(self, other: Any) -> TaskVector[D]:
        return self + -as_vector(other)

    def __neg__(self) -> TaskVector[D]:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector[D]:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
            raise EditError(
                f"the factor of a delta must be a finite number, got {factor!r}; write, for example, 0.5 * delta."
            )
        return self.with_differences({name: value * factor for name, value in self.differences.items()})

    __rmul__ = __mul__


def as_vector(value: Any) -> TaskVector[Any]:
    """Convert a delta to a task vector. A task vector is returned unchanged.

    Raises:
        EditError: ``value`` is neither a delta nor a task vector.
    """
    if isinstance(value, TaskVector):
        return value
    vector = getattr(value, "vector", None)
    if not callable(vector):
        raise EditError(
            f"expected an EditDelta or a TaskVector, got {type(value).__name__}; open a delta file with EditDelta.load."
        )
    return vector()  # type: ignore[return-value]


def check_same_base(one: TaskVector[Any], other: TaskVector[Any]) -> None:
    """Check that two vectors start from the same base model.

    Raises:
        EditError: the base models differ.
    """
    if one.about["fingerprint"] != other.about["fingerprint"]:
        raise EditError(
            f"the deltas belong to different base models (fingerprints {str(one.about['fingerprint'])[:12]} and "
            f"{str(other.about['fingerprint'])[:12]}); combine only deltas of the same base model."
        )
    for name in one.base.keys() & other.base.keys():
        mine, theirs = one.base[name], other.base[name]
        if mine.hash != theirs.hash or mine.values.shape != theirs.values.shape:
            raise EditError(
                f"the deltas have the same base model, but different values of tensor {name} before the edit, so at "
                "least one delta is not valid; make both deltas again."
            )
