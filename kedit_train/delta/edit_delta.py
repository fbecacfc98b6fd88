"""What an edit changed, as an object and as a file: look at it, apply it, take it back, calculate with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kedit_train.core.fsdp import placed_like, reshard, whole
from kedit_train.delta import delta_file as file
from kedit_train.delta.bitwise import fingerprint_of, tensor_hash
from kedit_train.delta.checkpoint import patch_checkpoint
from kedit_train.delta.tensor_change import Change, change_between
from kedit_train.delta.weight_source import grouped, named_tensors, weights_of
from kedit_train.errors import EditError

if TYPE_CHECKING:
    from kedit_train.delta.task_vector import TaskVector

State = Literal["base", "edited"]


class EditDelta:
    """The tensors that an edit changed, with their values before and after, and what they belong to.

    ``apply`` gives the edited weights and ``revert`` the base, both bit for bit: each writes recorded values, and only
    into a model whose tensors are, by their SHA-256, the ones recorded. Operators (``a + b``, ``-a``, ``0.5 * a``) give
    a :class:`~kedit_train.delta.task_vector.TaskVector` in fp32, and its ``delta()`` is one of these again.

    Args:
        changes: name -> what changed.
        meta: plain values: ``base`` (``fingerprint``, ``names``, ``name``, ``license``), ``edits`` (``hash``,
            ``count``), ``configuration``, ``scores``, ``versions``.

    Example:
        >>> delta = EditDelta.between(base, edited)
        >>> delta.save("paris.safetensors")
        >>> EditDelta.load("paris.safetensors").apply(model)
    """

    def __init__(self, changes: Mapping[str, Change], meta: Mapping[str, Any]) -> None:
        self.changes, self.meta = dict(changes), dict(meta)

    @classmethod
    def between(
        cls,
        base: Any,
        edited: Any,
        *,
        edits: Sequence[Any] | None = None,
        configuration: Any = None,
        scores: Mapping[str, float] | None = None,
        license: str | None = None,
        touched: Iterable[str] | None = None,
    ) -> EditDelta:
        """Compare two models, one tensor at a time.

        Adapters (PEFT) count as merged into the weights that they adapt, so the delta of a LoRA run is one like any
        other and applies to the plain base model; the adapter itself is what PEFT saves.

        Args:
            base, edited: modules, state dicts or folders of checkpoints, each of either kind.
            edits: what was edited; their hash and number go into ``meta``.
            configuration: of the run, plain values; scores: of the edit.
            license: of the base; by default what the model card in its folder states.
            touched: names that may differ, where that is known: the others are not read from ``edited``.

        Raises:
            EditError: the two have other names, shapes or dtypes.
        """
        old, new = weights_of(base), weights_of(edited)
        if touched is None and set(old) != set(new):
            name = sorted(set(old) ^ set(new))[0]
            only = "base" if name in old else "edited model"
            raise EditError(f"only the {only} has a tensor {name!r}; a delta lies between two states of one model")
        chosen, hashes, changes = set(old if touched is None else touched), [], {}
        for name in old:
            before = old[name]
            hashes.append(tensor_hash(before))
            if name not in chosen:
                continue
            after = new[name]
            if after.dtype != before.dtype or after.shape != before.shape:
                raise EditError(
                    f"{name} is {before.dtype} {list(before.shape)} in the base and {after.dtype} {list(after.shape)} "
                    "in the edited model; load both in one dtype"
                )
            change = change_between(before, after, hashes[-1], old.tied.get(name, ()))
            if change is not None:
                changes[name] = change
        about = {"name": old.about.get("name"), "license": license or old.about.get("license")}
        meta = {
            "base": {"fingerprint": fingerprint_of(hashes), "names": sorted(old), **about},
            "edits": {"hash": None, "count": 0} if edits is None else describe_edits(edits),
            "configuration": configuration,
            "scores": dict(scores or {}),
            "versions": versions(),
        }
        return cls(changes, meta)

    # -- the file

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, whole or not at all; a file of this name is replaced."""
        return file.write(path, self.changes, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EditDelta:
        """Open what :meth:`save` wrote. Tensors are mapped: they take memory when they are used.

        Raises:
            EditError: no delta, cut short, or not as it was written; the message says which.
        """
        return cls(*file.read(path))

    # -- a model in memory

    def verify(self, model: Any, *, full: bool = False) -> State:
        """Tell whether ``model`` is the base or the edited model, by the bits of every changed tensor.

        Args:
            model: a module, or a state dict.
            full: look at every other tensor too, by the fingerprint of the whole base.

        Raises:
            EditError: it is neither, part one and part the other, or of other shapes or dtypes; or it ties a changed
                tensor to one that the base has apart.
        """
        targets = self._targets(model)
        state: State = "base"
        for i, (name, tensor) in enumerate(targets):
            change, value = self.changes[name], _on_cpu(tensor)
            if i == 0:
                state = "edited" if change.state(value) == "edited" else "base"
            change.require(state, name, value)
        if full:
            known = {id(tensor): self.changes[name].base for name, tensor in targets}
            tensors = named_tensors(model) if isinstance(model, nn.Module) else dict(model)
            hashes = [known.get(id(t)) or tensor_hash(_on_cpu(t)) for t in (tensors[n] for n in grouped(tensors))]
            if fingerprint_of(hashes) != self.meta["base"]["fingerprint"]:
                raise EditError(
                    "tensors that the delta leaves alone differ from the model that was edited; the edit can be "
                    "applied, but not to the model that it was made and measured on"
                )
        return state

    def apply(self, model: Any) -> Any:
        """Turn the base, in place, into the edited model, bit for bit; return it. All or nothing.

        Args:
            model: a module (sharded by FSDP2 too: every process calls this), or a state dict.

        Raises:
            EditError: as :meth:`verify`, or the delta is applied already; then nothing was changed.
        """
        return self._write(model, "edited")

    def revert(self, model: Any) -> Any:
        """Turn the edited model, in place, back into the base, bit for bit; return it. All or nothing."""
        return self._write(model, "base")

    # -- a checkpoint on the disk

    def apply_to_checkpoint(self, folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
        """Write the edited model as a new checkpoint, one tensor at a time; see ``delta/checkpoint.py``."""
        return patch_checkpoint(self.changes, Path(folder), Path(out), "edited")

    def revert_checkpoint(self, folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
        """Write the base as a new checkpoint from that of the edited model."""
        return patch_checkpoint(self.changes, Path(folder), Path(out), "base")

    # -- looking, and calculating

    def difference(self, name: str) -> Tensor:
        """``edited - base`` of one tensor, whole, in fp32: what task arithmetic calculates with."""
        if name not in self.changes:
            raise EditError(f"the delta does not change {name!r}; it changes {', '.join(list(self.changes)[:4])}")
        return self.changes[name].difference()

    @property
    def nbytes(self) -> int:
        """Bytes of all changes."""
        return sum(change.nbytes for change in self.changes.values())

    def vector(self) -> TaskVector:
        """The differences in fp32."""
        from kedit_train.delta.task_vector import TaskVector

        return TaskVector.of(self)

    def __add__(self, other: Any) -> TaskVector:
        return self.vector() + other

    def __sub__(self, other: Any) -> TaskVector:
        return self.vector() - other

    def __neg__(self) -> TaskVector:
        return -self.vector()

    def __mul__(self, factor: float) -> TaskVector:
        return self.vector() * factor

    __rmul__ = __mul__

    def __len__(self) -> int:
        return len(self.changes)

    def __repr__(self) -> str:
        layouts = ", ".join(f"{name} ({change.layout})" for name, change in list(self.changes.items())[:3])
        more = ", ..." if len(self) > 3 else ""
        return f"EditDelta({len(self)} tensors, {self.nbytes / 1e6:.2f} MB: {layouts}{more})"

    def _targets(self, model: Any) -> list[tuple[str, Tensor]]:
        """(name in the delta, tensor of the model): each tensor of the model once."""
        if isinstance(model, nn.Module):
            reshard(model)
            named = named_tensors(model)
        elif isinstance(model, Mapping):
            named = dict(model)
        else:
            raise EditError(f"a delta applies to a module or a state dict, not to a {type(model).__name__}")
        groups = {name: (first, *others) for first, others in grouped(named).items() for name in (first, *others)}
        apart = set(self.meta["base"]["names"])
        targets: dict[str, tuple[str, Tensor]] = {}
        for name, change in self.changes.items():
            held = [one for one in (name, *change.tied) if one in named]
            if not held:
                hint = "; merge its adapter, or give the plain model" if hasattr(model, "peft_config") else ""
                raise EditError(f"the model has no tensor {name!r}: the delta belongs to another model{hint}")
            for one in held:
                for other in groups[one]:
                    if other in apart and other != name:
                        raise EditError(
                            f"the model ties {one} to {other}, which the base has apart, so both would change; load "
                            "the model with tie_word_embeddings=False"
                        )
                targets.setdefault(groups[one][0], (name, named[one]))
        return list(targets.values())

    @torch.no_grad()
    def _write(self, model: Any, to: State) -> Any:
        targets = self._targets(model)
        for name, tensor in targets:
            self.changes[name].require("base" if to == "edited" else "edited", name, _on_cpu(tensor))
        for name, tensor in targets:
            change = self.changes[name]
            value = change.put(_on_cpu(tensor), change.after if to == "edited" else change.before)
            tensor.copy_(placed_like(value.to(tensor.device), tensor))
        return model


def versions() -> dict[str, str]:
    """Of this package and the libraries that computed the weights."""
    found = {}
    for name in ("kedit-train", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_edits(edits: Sequence[Any]) -> dict[str, Any]:
    """Hash and number of edits, the hash as :class:`~kedit_train.data.EditDataset` has it."""
    own = getattr(edits, "hash", None)
    if not isinstance(own, str):
        from kedit_train.data import EditDataset

        own = EditDataset(edits).hash
    return {"hash": own, "count": len(edits)}


def _on_cpu(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu()
