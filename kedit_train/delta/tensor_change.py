"""The change of one tensor: its values before and after the edit, at the places where they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """The change of one tensor, on the CPU.

    A change stores the values before and after the edit. It does not store the difference of these values, because in
    floating point ``base + (edited - base)`` is not exactly ``edited``. It does not store low-rank factors either,
    because the last bits of the product of the factors depend on the machine.

    Args:
        layout: which values are stored: the whole tensor (``dense``), ``rows`` (along the first dimension), ``columns``
            (along the last dimension), or ``entries`` of the flattened tensor.
        index: ascending row, column or entry numbers, [k]; None for ``dense``.
        before: the stored values before the edit. The layout determines their shape: ``shape`` for ``dense``,
            [k, ...] for ``rows``, [..., k] for ``columns``, and [k] for ``entries``.
        after: the stored values after the edit, with the same shape and dtype as ``before``.
        shape: the shape of the whole tensor.
        base: SHA-256 of the whole tensor before the edit (:func:`~kedit_train.delta.bitwise.tensor_hash`).
        tied: other names of the same tensor in the base model.
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
        """The dtype of the tensor."""
        return self.before.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes, in memory and in a file."""
        return sum(t.numel() * t.element_size() for t in (self.index, self.before, self.after) if t is not None)

    def select(self, whole: Tensor) -> Tensor:
        """Return the values of a whole tensor at the positions that this change covers."""
        if self.index is None:
            return whole
        flat, dim = self._oriented(whole)
        return flat.index_select(dim, self.index.long())

    def replaced(self, whole: Tensor, values: Tensor) -> Tensor:
        """Return a copy of a whole CPU tensor, with ``values`` at the positions that this change covers."""
        if self.index is None:
            return values.clone()
        copy = whole.detach().clone(memory_format=torch.contiguous_format)
        flat, dim = self._oriented(bits(copy))
        flat.index_copy_(dim, self.index.long(), bits(values))
        return copy

    def state(self, whole: Tensor) -> Literal["base", "edited"] | None:
        """Return the state of a whole CPU tensor: "base", "edited" or None.

        The state is "base" if the tensor has the bits before the edit, "edited" if it has the bits after the edit, and
        None in all other cases.
        """
        values = self.select(whole)
        if same_bits(values, self.before):
            return "base" if tensor_hash(whole) == self.base else None
        if same_bits(values, self.after):
            return "edited" if tensor_hash(self.replaced(whole, self.before)) == self.base else None
        return None

    def require(self, expected: Literal["base", "edited"], name: str, whole: Tensor) -> None:
        """Check, bit for bit, that a whole CPU tensor has the expected values.

        "base" expects the values before the edit, and "edited" expects the values after the edit.

        Raises:
            EditError: the tensor has another shape, another dtype or other values.
        """
        if whole.dtype != self.dtype or tuple(whole.shape) != self.shape:
            raise EditError(
                f"tensor {name} is {_described(whole.dtype, whole.shape)} in the model and "
                f"{_described(self.dtype, self.shape)} in the delta; use the model for which the delta was "
                "made, in the dtype of the delta."
            )
        state = self.state(whole)
        if state == expected:
            return
        if state is None:
            raise EditError(
                f"tensor {name} of the model has neither the values before the edit nor the values after the edit "
                "(compared by SHA-256), so the delta was made for another model or for another version of this model; "
                "use the model for which the delta was made."
            )
        if expected == "base":
            raise EditError(
                f"tensor {name}: the delta is already applied to this model; revert the delta, or load the base model."
            )
        raise EditError(
            f"tensor {name}: the delta cannot be reverted, because the tensor already has its unedited values; "
            "call revert only on a model to which the delta is applied."
        )

    def difference(self) -> Tensor:
        """Return ``after - before`` for the whole tensor. Entries that the edit did not change are 0.

        The result is in fp64 if the tensor is in fp64, and in fp32 otherwise.

        Raises:
            EditError: the tensor contains no floating-point numbers.
        """
        if not self.dtype.is_floating_point:
            raise EditError(
                f"arithmetic with deltas needs floating-point tensors, got {self.dtype}; use deltas without tensors of "
                "this dtype."
            )
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        changed = self.after.to(wide) - self.before.to(wide)
        return changed if self.index is None else self.replaced(self._zeros(wide), changed)

    def norms(self) -> dict[str, float | None]:
        """Return two Frobenius norms, "change" and "before".

        "change" is the norm of ``after - before``. "before" is the norm of the whole tensor before the edit, or None if
        only a part of its values is stored.
        """
        moved = self.after.double() - self.before.double()
        return {
            "change": float(moved.norm()),
            "before": float(self.before.double().norm()) if self.index is None else None,
        }

    def partial_base(self) -> tuple[Tensor, Tensor]:
        """Return the whole tensor before the edit, with 0 for unknown values, and a bool mask of the known values."""
        known = self.replaced(self._zeros(torch.bool), torch.ones_like(self.before, dtype=torch.bool))
        return self.replaced(self._zeros(self.dtype), self.before), known

    def check(self) -> None:
        """Check that layout, index, values and shape agree, for example after reading a file.

        Raises:
            EditError: one of these four parts contradicts the other parts. The message names the wrong part.
        """
        expected, size = self.shape, math.prod(self.shape)
        if self.layout != "dense":
            if self.index is None or self.index.ndim != 1 or self.index.dtype not in (torch.int32, torch.int64):
                raise EditError(
                    f"the index of the {self.layout} must be a one-dimensional tensor of integers; save the delta again"
                )
            if not self.shape:
                raise EditError(
                    f"a scalar tensor must have the layout 'dense', got {self.layout!r}; save the delta again"
                )
            k, bound = len(self.index), {"rows": self.shape[0], "columns": self.shape[-1]}.get(self.layout, size)
            ascending = bool((self.index[1:] > self.index[:-1]).all())
            if not ascending or (k and not 0 <= int(self.index[0]) <= int(self.index[-1]) < bound):
                raise EditError(
                    f"the index of the {self.layout} must be in ascending order without repetitions, and each number "
                    f"must be between 0 and {bound - 1}; save the delta again"
                )
            expected = {"rows": (k, *self.shape[1:]), "columns": (*self.shape[:-1], k)}.get(self.layout, (k,))
        if not self.before.numel():
            raise EditError("the change must contain at least one value, got none; save the delta again")
        for values in (self.before, self.after):
            if tuple(values.shape) != expected or values.dtype != self.before.dtype:
                raise EditError(
                    f"the values before and after the edit must have shape {list(expected)} and dtype "
                    f"{self.before.dtype}, got shape {list(values.shape)} and dtype {values.dtype}; save the delta "
                    "again"
                )

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        """Return zeros with the shape of the whole tensor. Raise an error if they do not fit into memory."""
        try:
            return torch.zeros(self.shape, dtype=dtype)
        except RuntimeError as error:
            raise EditError(
                f"a tensor of shape {list(self.shape)} and dtype {dtype} does not fit into memory; use a machine with "
                "more memory."
            ) from error

    def _cost(self) -> int:
        """Return the file size of this layout in bytes. ``before`` and ``after`` must be whole tensors."""
        size = self.before.numel()
        if self.index is None:
            return 2 * size * self.before.element_size()
        each = {"rows": size // self.shape[0], "columns": size // self.shape[-1]}.get(self.layout, 1)
        return len(self.index) * (2 * each * self.before.element_size() + self.index.element_size())

    def _oriented(self, whole: Tensor) -> tuple[Tensor, int]:
        return (whole.reshape(-1), 0) if self.layout == "entries" else (whole, 0 if self.layout == "rows" else -1)


def change_between(
    base: Tensor, edited: Tensor, base_hash: str, tied: tuple[str, ...] = (), known: Tensor | None = None
) -> Change | None:
    """Return the :class:`Change` between two whole CPU tensors in the smallest layout, or None if they are equal.

    Args:
        base: the tensor before the edit.
        edited: the tensor after the edit, with the same dtype and shape.
        base_hash: :func:`~kedit_train.delta.bitwise.tensor_hash` of ``base``.
        tied: other names of this tensor.
        known: bool mask, True where the value of ``base`` is known. None: all values are known. Entries
            with an unknown base value are never stored, so the edit must not change these entries.
    """
    moved = bits(base) != bits(edited)
    if not bool(moved.any()):
        return None
    indices: dict[Layout, Tensor | None] = {"dense": None}
    # If most entries have changed, an index of these entries would need several times the memory of the tensor. So the
    # index is made only if the layout "entries" can be smaller than "dense". In "entries", each changed entry needs two
    # values, and at least four bytes for its number.
    each = 2 * base.element_size()
    if base.ndim and (known is not None or int(moved.sum()) * (each + 4) < base.numel() * each):
        indices["entries"] = _numbers(moved.reshape(-1))
    if base.ndim > 1:
        indices["rows"] = _numbers(moved.flatten(1).any(1))
        indices["columns"] = _numbers(moved.flatten(0, -2).any(0))
    shape, sizes = tuple(base.shape), {}
    for layout, index in indices.items():
        candidate = Change(layout, index, base, edited, shape, base_hash)
        if known is None or layout == "entries" or bool(candidate.select(known).all()):
            sizes[layout] = candidate._cost()
    best: Layout = min(sizes, key=lambda layout: sizes[layout])
    places = Change(best, indices[best], base, edited, shape, base_hash)
    # The values are copied, because the compared models may change later.
    before, after = (
        places.select(whole).detach().clone(memory_format=torch.contiguous_format) for whole in (base, edited)
    )
    return Change(best, indices[best], before, after, shape, base_hash, tied)


def _numbers(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1).to(torch.int32 if len(mask) < 2**31 else torch.int64)


def _described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
