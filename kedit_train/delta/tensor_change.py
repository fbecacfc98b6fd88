"""What changed in one tensor: its values before and after, where they differ and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kedit_train.delta.bitwise import bits, same_bits, tensor_hash
from kedit_train.errors import EditError

Layout = Literal["dense", "rows", "columns", "entries"]
LAYOUTS: tuple[Layout, ...] = ("dense", "rows", "columns", "entries")


@dataclass(frozen=True)
class Change:
    """One tensor's part in a delta, on the CPU.

    Both values are kept rather than their difference: in floating point ``base + (edited - base)`` is not ``edited``.
    A product of low-rank factors is no layout either: its last bits depend on the order in which a matrix product is
    summed, so it would not give the same weights on another machine.

    Args:
        layout: ``dense``; ``rows`` (along the first dimension) or ``columns`` (along the last); ``entries`` of the
            flattened tensor.
        index: ascending row, column or entry numbers, ``[k]``; None where dense.
        before: values before the edit at those places: ``shape``, or ``shape`` with ``k`` along that dimension, or
            ``[k]``.
        after: values after it, the same shape and dtype.
        shape: of the whole tensor.
        base: hash of the whole tensor before the edit (:func:`~kedit_train.delta.bitwise.tensor_hash`).
        tied: other names under which the base holds this very tensor.
    """

    layout: Layout
    index: Tensor | None
    before: Tensor
    after: Tensor
    shape: tuple[int, ...]
    base: str
    tied: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor, before and after."""
        return self.before.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the change takes in memory and in a file."""
        return sum(t.numel() * t.element_size() for t in (self.index, self.before, self.after) if t is not None)

    def taken(self, whole: Tensor) -> Tensor:
        """Of a whole tensor, the values at the places of this change."""
        if self.index is None:
            return whole
        flat, dim = self._oriented(whole)
        return flat.index_select(dim, self.index.long())

    def put(self, whole: Tensor, values: Tensor) -> Tensor:
        """A copy of a whole CPU tensor with ``values`` at the places of this change."""
        if self.index is None:
            return values.clone()
        made = whole.detach().clone(memory_format=torch.contiguous_format)
        flat, dim = self._oriented(bits(made))
        flat.index_copy_(dim, self.index.long(), bits(values))
        return made

    def state(self, whole: Tensor) -> Literal["base", "edited"] | None:
        """Whether a whole CPU tensor is, bit for bit, the one before or after the edit; None where it is neither."""
        found = self.taken(whole)
        if same_bits(found, self.before):
            return "base" if tensor_hash(whole) == self.base else None
        if same_bits(found, self.after):
            return "edited" if tensor_hash(self.put(whole, self.before)) == self.base else None
        return None

    def require(self, wanted: Literal["base", "edited"], name: str, whole: Tensor) -> None:
        """Refuse a whole CPU tensor that is not, bit for bit, in the state from which it is to be changed."""
        if whole.dtype != self.dtype or tuple(whole.shape) != self.shape:
            raise EditError(
                f"{name} is {whole.dtype} {list(whole.shape)} in the model and {self.dtype} {list(self.shape)} in the "
                "delta; load the model that was edited, in its dtype"
            )
        state = self.state(whole)
        if state == wanted:
            return
        if state is None:
            raise EditError(
                f"{name} holds other values than the model that was edited, before or after (by their SHA-256); give "
                "the model that the delta belongs to"
            )
        done, undo = ("applied already", "apply") if wanted == "base" else ("not applied", "revert")
        raise EditError(f"{name}: the delta is {done}; there is nothing to {undo}")

    def difference(self) -> Tensor:
        """``after - before`` of the whole tensor in fp32 (fp64 of fp64), zero where nothing changed.

        Raises:
            EditError: the tensor holds no floating-point numbers.
        """
        if not self.dtype.is_floating_point:
            raise EditError(f"a tensor of {self.dtype} has no difference to calculate with; leave it out of the scope")
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        changed = self.after.to(wide) - self.before.to(wide)
        return changed if self.index is None else self.put(self._zeros(wide), changed)

    def partial_base(self) -> tuple[Tensor, Tensor]:
        """The whole tensor before the edit, with zeros where this change does not know it; and (bool) where it does."""
        known = self.put(self._zeros(torch.bool), torch.ones_like(self.before, dtype=torch.bool))
        return self.put(self._zeros(self.dtype), self.before), known

    def check(self) -> None:
        """Refuse parts that do not fit each other (of a file, say).

        Raises:
            EditError: what does not fit.
        """
        expected, size = self.shape, math.prod(self.shape)
        if self.layout != "dense":
            if self.index is None or self.index.ndim != 1 or self.index.dtype not in (torch.int32, torch.int64):
                raise EditError(f"its {self.layout} are not numbered by a vector of integers")
            if not self.shape:
                raise EditError(f"a number has no {self.layout}")
            k, bound = len(self.index), {"rows": self.shape[0], "columns": self.shape[-1]}.get(self.layout, size)
            ascending = bool((self.index[1:] > self.index[:-1]).all())
            if not ascending or (k and not 0 <= int(self.index[0]) <= int(self.index[-1]) < bound):
                raise EditError(f"its numbers of {self.layout} do not ascend from 0 to {bound - 1}")
            expected = {"rows": (k, *self.shape[1:]), "columns": (*self.shape[:-1], k)}.get(self.layout, (k,))
        if not self.before.numel():
            raise EditError("it changes no entry")
        for values in (self.before, self.after):
            if tuple(values.shape) != expected or values.dtype != self.before.dtype:
                raise EditError(f"its values are {values.dtype} {list(values.shape)}, not {list(expected)}")

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        """A whole tensor; that a delta holds one entry of it says nothing of whether there is memory for all."""
        try:
            return torch.zeros(self.shape, dtype=dtype)
        except RuntimeError as error:
            raise EditError(
                f"a tensor of {list(self.shape)} in {dtype} does not fit into memory; calculate on a larger machine"
            ) from error

    def _cost(self) -> int:
        """Bytes that both values and their numbers would take, of whole tensors in ``before`` and ``after``."""
        size = self.before.numel()
        if self.index is None:
            return 2 * size * self.before.element_size()
        each = {"rows": size // self.shape[0], "columns": size // self.shape[-1]}.get(self.layout, 1)
        return len(self.index) * (2 * each * self.before.element_size() + self.index.element_size())

    def _oriented(self, whole: Tensor) -> tuple[Tensor, int]:
        return (whole.reshape(-1), 0) if self.layout == "entries" else (whole, 0 if self.layout == "rows" else -1)


def change_between(
    base: Tensor, edited: Tensor, hashed: str, tied: tuple[str, ...] = (), known: Tensor | None = None
) -> Change | None:
    """The smallest exact :class:`Change` from one whole CPU tensor to another of its dtype and shape; None for none.

    Args:
        hashed: the base's :func:`~kedit_train.delta.bitwise.tensor_hash`.
        tied: other names of this tensor.
        known: bool, where ``base`` is known (everywhere it changes, at least); nothing else is recorded.
    """
    moved = bits(base) != bits(edited)
    if not bool(moved.any()):
        return None
    indices: dict[Layout, Tensor | None] = {"dense": None}
    if base.ndim:
        indices["entries"] = _numbered(moved.reshape(-1))
    if base.ndim > 1:
        indices["rows"] = _numbered(moved.flatten(1).any(1))
        indices["columns"] = _numbered(moved.flatten(0, -2).any(0))
    shape, sizes = tuple(base.shape), {}
    for layout, index in indices.items():
        places = Change(layout, index, base, edited, shape, hashed)
        if known is None or layout == "entries" or bool(places.taken(known).all()):
            sizes[layout] = places._cost()
    best: Layout = min(sizes, key=lambda layout: sizes[layout])
    places = Change(best, indices[best], base, edited, shape, hashed)
    # Copies: the models that are compared go on to change.
    before, after = (
        places.taken(whole).detach().clone(memory_format=torch.contiguous_format) for whole in (base, edited)
    )
    return Change(best, indices[best], before, after, shape, hashed, tied)


def _numbered(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1).to(torch.int32 if len(mask) < 2**31 else torch.int64)
