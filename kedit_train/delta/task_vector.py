"""Task arithmetic: differences of weights in fp32, added, scaled, negated, and rounded once at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kedit_train.delta.edit_delta import EditDelta, versions
from kedit_train.delta.tensor_change import change_between
from kedit_train.errors import EditError


@dataclass(frozen=True)
class TaskVector:
    """A linear combination, or a merge, of what edits of one base changed ("Editing Models with Task Arithmetic",
    arXiv 2212.04089).

    It is no edit of weights yet: ``base + difference`` has to be rounded to the base's dtype. :meth:`delta` does so,
    once, and records the bits before and after, so that what comes out applies and reverts exactly. It needs no model:
    the deltas bring the base's values along.

    ``1.0 * a`` is therefore ``a`` within rounding (in fp32 the last bit of ``base + (edited - base)``); a model between
    the base (0) and the edit (1), as WiSE-FT takes it (arXiv 2109.01903), is ``alpha * a``.

    Args:
        differences: name -> fp32 (fp64 for fp64) difference, whole tensors.
        base: name -> the base's tensor, as far as the deltas bring it along; known: name -> bool, where they do.
        hashes: name -> hash of the base's tensor.
        tied: name -> other names of the tensor.
        about: the base, as in ``EditDelta.meta["base"]``.
        parents: the ``edits`` of the deltas that went in.
    """

    differences: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    known: Mapping[str, Tensor]
    hashes: Mapping[str, str]
    tied: Mapping[str, tuple[str, ...]]
    about: Mapping[str, Any]
    parents: tuple[Mapping[str, Any], ...] = field(default=())

    @classmethod
    def of(cls, delta: EditDelta) -> TaskVector:
        """The differences of one delta.

        Raises:
            EditError: it changes a tensor that holds no floating-point numbers.
        """
        bases = {name: change.partial_base() for name, change in delta.changes.items()}
        return cls(
            {name: delta.difference(name) for name in delta.changes},
            {name: base for name, (base, _) in bases.items()},
            {name: known for name, (_, known) in bases.items()},
            {name: change.base for name, change in delta.changes.items()},
            {name: change.tied for name, change in delta.changes.items()},
            delta.meta["base"],
            (delta.meta.get("edits", {}),),
        )

    @torch.no_grad()
    def delta(self, configuration: Any = None) -> EditDelta:
        """Round to the base's dtype once, and record the bits.

        Raises:
            EditError: a weight would be infinite or no number.
        """
        changes = {}
        for name, difference in self.differences.items():
            base = self.base[name]
            moved = (base.to(difference.dtype) + difference).to(base.dtype)
            edited = torch.where(difference != 0, moved, base)
            # Widened: torch asks no float8 whether it is finite.
            if not bool(moved.to(difference.dtype)[difference != 0].isfinite().all()):
                raise EditError(f"{name} would no longer be finite in {base.dtype}; take a smaller coefficient")
            change = change_between(base, edited, self.hashes[name], self.tied[name], self.known[name])
            if change is not None:
                changes[name] = change
        count = sum(int(parent.get("count", 0)) for parent in self.parents)
        edits = {"hash": None, "count": count, "parents": [dict(parent) for parent in self.parents]}
        meta = {"base": dict(self.about), "edits": edits, "configuration": configuration, "scores": {}}
        return EditDelta(changes, meta | {"versions": versions()})

    def apply(self, model: Any) -> EditDelta:
        """Round, apply, and return the delta that was applied: its ``revert(model)`` gives the base back."""
        delta = self.delta()
        delta.apply(model)
        return delta

    def combined(self, others: Mapping[str, Tensor], *vectors: TaskVector) -> TaskVector:
        """These differences, on the base that this vector and ``vectors`` know in parts."""
        base, known, hashes, tied = dict(self.base), dict(self.known), dict(self.hashes), dict(self.tied)
        for vector in vectors:
            check_same_base(self, vector)
            for name, places in vector.known.items():
                base[name] = torch.where(places, vector.base[name], base[name]) if name in base else vector.base[name]
                known[name] = places | known[name] if name in known else places
            hashes |= vector.hashes
            tied |= vector.tied
        parents = self.parents + tuple(parent for vector in vectors for parent in vector.parents)
        return TaskVector(others, base, known, hashes, tied, self.about, parents)

    def __add__(self, other: Any) -> TaskVector:
        vector = as_vector(other)
        names = list(dict.fromkeys([*self.differences, *vector.differences]))
        check_same_base(self, vector)
        return self.combined({name: sum_of(name, self, vector) for name in names}, vector)

    def __sub__(self, other: Any) -> TaskVector:
        return self + -as_vector(other)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
            raise EditError(f"a delta is scaled by a finite number, not by {factor!r}")
        return self.combined({name: value * factor for name, value in self.differences.items()})

    __rmul__ = __mul__

    def norm(self) -> float:
        """Euclidean length over all tensors."""
        return math.sqrt(sum(float(value.double().square().sum()) for value in self.differences.values()))


def as_vector(value: Any) -> TaskVector:
    """A delta's differences; a vector as it is."""
    if isinstance(value, TaskVector):
        return value
    if isinstance(value, EditDelta):
        return value.vector()
    raise EditError(f"deltas are added to deltas, not to a {type(value).__name__}")


def check_same_base(one: TaskVector, other: TaskVector) -> None:
    """Refuse vectors that do not begin at one point."""
    if one.about["fingerprint"] != other.about["fingerprint"]:
        raise EditError(
            f"the deltas belong to different bases ({str(one.about['fingerprint'])[:12]} and "
            f"{str(other.about['fingerprint'])[:12]}), so their differences do not add up to anything; make both from "
            "one model"
        )
    for name in one.hashes.keys() & other.hashes.keys():
        if one.hashes[name] != other.hashes[name] or one.base[name].shape != other.base[name].shape:
            raise EditError(f"the deltas disagree on {name} in their base; one of them was put together wrongly")


def sum_of(name: str, *vectors: TaskVector) -> Tensor:
    """The sum of what vectors say of one tensor, where they say anything."""
    found = [vector.differences[name] for vector in vectors if name in vector.differences]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


class Relation(NamedTuple):
    """How two edits lie to each other: their cosine, and what it suggests."""

    cosine: float
    kind: str
    add: bool
    negate: bool


def cosine(one: Any, other: Any) -> float:
    """The cosine of the angle between two deltas over all tensors; 0 where one of them is zero.

    Raises:
        EditError: their bases differ.
    """
    a, b = as_vector(one), as_vector(other)
    check_same_base(a, b)
    both = a.differences.keys() & b.differences.keys()
    product = sum(float((a.differences[n].double() * b.differences[n].double()).sum()) for n in both)
    lengths = a.norm() * b.norm()
    return product / lengths if lengths else 0.0


def relation(one: Any, other: Any, *, irrelevant: float = 0.1) -> Relation:
    """What the cosine of two deltas suggests: whether adding both, and whether negating one, is likely to work.

    "When is Task Vector Provably Effective for Model Editing?" (arXiv 2504.10957) proves, for a one-layer nonlinear
    Transformer that classifies, that adding works for irrelevant and for aligned tasks, and that negating one forgets
    it without harming the other where they are irrelevant or contradictory. A lead, not a guarantee: measure with
    :func:`~kedit_train.delta.sweep.sweep`.

    Args:
        irrelevant: a cosine of at most this size counts as none. Two random directions in n dimensions have one of
            about ``1 / sqrt(n)``.
    """
    value = cosine(one, other)
    kind = "irrelevant" if abs(value) <= irrelevant else "aligned" if value > 0 else "contradictory"
    return Relation(value, kind, add=kind != "contradictory", negate=kind != "aligned")


def analogy(a: Any, b: Any, c: Any) -> TaskVector:
    """``c + (b - a)``: what turns a into b, done to c (arXiv 2212.04089)."""
    return as_vector(c) + (as_vector(b) - a)
