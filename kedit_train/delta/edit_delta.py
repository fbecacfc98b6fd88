"""The weight changes of an edit: apply, revert, combine, save and load them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kedit_train.core.fsdp import full_tensor, reshard, shard_like
from kedit_train.delta import delta_file
from kedit_train.delta.bitwise import fingerprint_of, tensor_hash
from kedit_train.delta.checkpoint import patch_checkpoint
from kedit_train.delta.metadata import describe_edits, library_versions
from kedit_train.delta.task_vector import BaseTensor, TaskVector
from kedit_train.delta.tensor_change import Change, change_between
from kedit_train.delta.weight_source import grouped, named_tensors, weights_of
from kedit_train.errors import EditError
from kedit_train.evaluation.reporting.html_elements import fragment, paragraph
from kedit_train.evaluation.reporting.html_report import drift_section
from kedit_train.plural import plural

State = Literal["base", "edited"]


class EditDelta:
    """The tensors that an edit changed, with their values before and after.

    :meth:`apply` turns the base model into the edited model, and :meth:`revert` turns the edited model back into the
    base model, bit for bit. Before writing any value, both methods check the SHA-256 of all tensors that will change.
    The operators ``a + b``, ``-a`` and ``0.5 * a`` return a :class:`~kedit_train.delta.TaskVector` in fp32. Its method
    ``delta()`` converts the result to an ``EditDelta``.

    Create a delta with :meth:`between` or :meth:`load`, or let the ``SaveDelta`` callback save one.

    Args:
        changes: the change of each tensor, by name.
        meta: the metadata, as values that JSON can store. The keys are ``base`` (with ``fingerprint``, ``names``,
            ``name`` and ``license``), ``edits`` (with ``hash`` and ``count``), ``configuration``, ``scores`` and
            ``versions``.

    Example:
        >>> import tempfile, torch
        >>> from kedit_train import EditDelta
        >>> base = {"w": torch.tensor([1.0, 2.0, 3.0])}
        >>> edited = {"w": torch.tensor([1.0, 2.5, 3.0])}
        >>> delta = EditDelta.between(base, edited)
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = delta.save(f"{folder.name}/edit.safetensors")
        >>> EditDelta.load(path).apply(base)
        {'w': tensor([1.0000, 2.5000, 3.0000])}
        >>> EditDelta.load(path).revert(base)
        {'w': tensor([1., 2., 3.])}
    """

    def __init__(self, changes: Mapping[str, Change], *, meta: Mapping[str, Any]) -> None:
        self.changes: dict[str, Change] = dict(changes)
        self.meta: dict[str, Any] = dict(meta)

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
        """Make a delta by comparing two models, one tensor at a time.

        PEFT adapters are treated as merged into the weights that they adapt. So the delta of a LoRA run applies to the
        base model without adapters. To save the adapter itself, use PEFT.

        Args:
            base: a module, a state dict or the folder of a checkpoint.
            edited: a module, a state dict or the folder of a checkpoint. For example, ``base`` can be a folder and
                ``edited`` a module.
            edits: the edits that were made. The metadata stores the hash and the number of these edits.
            configuration: the configuration of the run, as plain values.
            scores: the scores of the edit, by name.
            license: the license of the base model. With None, the license is read from the model card in the folder of
                the base model.
            touched: names of the tensors that the edit may have changed, if known. No other tensor of ``edited`` is
                read. With None, all tensors are compared.

        Raises:
            EditError: the models differ in the names, shapes or dtypes of their tensors.
        """
        old, new = weights_of(base), weights_of(edited)
        if touched is None and set(old) != set(new):
            name = sorted(set(old) ^ set(new))[0]
            only = "base model" if name in old else "edited model"
            raise EditError(f"only the {only} has a tensor {name!r}; compare two states of the same model.")
        chosen, hashes, changes = set(old if touched is None else touched), [], {}
        for name in old:
            before = old[name]
            hashes.append(tensor_hash(before))
            if name not in chosen:
                continue
            after = new[name]
            if after.dtype != before.dtype or after.shape != before.shape:
                raise EditError(
                    f"tensor {name} is {before.dtype} {list(before.shape)} in the base model and {after.dtype} "
                    f"{list(after.shape)} in the edited model; load the same model twice, in the same dtype."
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
            "versions": library_versions(),
        }
        return cls(changes, meta=meta)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file atomically; an existing file is replaced.

        Raises:
            EditError: the metadata cannot be saved as JSON, or the file cannot be written.
        """
        return delta_file.write(path, self.changes, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EditDelta:
        """Read a file from :meth:`save`, and verify every byte.

        The delta uses its own copy, so you can change or delete the file as soon as this method has returned.

        A file of up to 64 MiB is copied into memory. A larger file is copied to a temporary file on disk, next to the
        original or in the folder for temporary files. Tensors in the temporary file take memory only when they are
        used. The temporary file is deleted together with the delta object.

        Raises:
            EditError: the file is not a delta, is damaged, or was changed after it was written.
        """
        changes, meta = delta_file.read(path)
        return cls(changes, meta=meta)

    def verify(self, model: Any, *, full: bool = False) -> State:
        """Check, bit for bit, whether ``model`` is the base model or the edited model, and return "base" or "edited".

        Args:
            model: a module or a state dict.
            full: False checks only the tensors that the delta changes. True checks all tensors of the model.

        Raises:
            EditError: the model is neither the base model nor the edited model, is partly edited, or has other shapes
                or dtypes. The error is also raised if two tensors are tied in ``model`` but separate in the base
                model, and the delta changes one of them.
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
                    "the model differs from the base model in tensors that the delta does not change; use the model "
                    "for which the delta was made. apply() and revert() do not check these tensors and still work, but "
                    "the scores in the delta may not hold for this model."
                )
        return state

    def apply(self, model: Any) -> Any:
        """Turn the base model into the edited model, in place and bit for bit, and return the model.

        Every tensor is checked before the first one is written.

        Args:
            model: a module or a state dict. With FSDP2, every process must call this method.

        Raises:
            EditError: for the same reasons as in :meth:`verify`, or because the delta is already applied. If an error
                is raised, the model is unchanged.
        """
        return self._write(model, "edited")

    def revert(self, model: Any) -> Any:
        """Turn the edited model back into the base model, in place and bit for bit, and return the model.

        Raises:
            EditError: for the same reasons as in :meth:`verify`, or because the delta is not applied. If an error is
                raised, the model is unchanged.
        """
        return self._write(model, "base")

    def apply_to_checkpoint(self, folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
        """Write the edited model as a new checkpoint, with one tensor in memory at a time.

        Args:
            folder: the safetensors checkpoint of the base model, sharded or not.
            out: a folder that does not exist yet.

        Raises:
            EditError: ``folder`` is not the base model, or ``out`` exists.
        """
        return patch_checkpoint(self.changes, Path(folder), Path(out), "edited")

    def revert_checkpoint(self, folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
        """Write the base model as a new checkpoint from the checkpoint of the edited model.

        Args:
            folder: the safetensors checkpoint of the edited model.
            out: a folder that does not exist yet.

        Raises:
            EditError: ``folder`` is not the edited model, or ``out`` exists.
        """
        return patch_checkpoint(self.changes, Path(folder), Path(out), "base")

    def difference(self, name: str) -> Tensor:
        """Return ``edited - base`` of one whole tensor in fp32 (fp64 for fp64 weights).

        Raises:
            EditError: the delta does not change this tensor, or the tensor contains no floating-point numbers.
        """
        if name not in self.changes:
            raise EditError(
                f"the delta does not change {name!r}; choose, for example, {', '.join(list(self.changes)[:4])}."
            )
        return self.changes[name].difference()

    def norms(self) -> dict[str, dict[str, float | None]]:
        """Return two Frobenius norms for each changed tensor, "change" and "before".

        "change" is the norm of ``edited - base``. "before" is the norm of the base tensor, or None if the delta stores
        only a part of the base tensor. Tensors without floating-point numbers are left out. Tensors whose change has
        an infinite or NaN norm are also left out.
        """
        norms = {name: change.norms() for name, change in self.changes.items() if change.dtype.is_floating_point}
        return {name: values for name, values in norms.items() if math.isfinite(values["change"] or 0.0)}

    @property
    def nbytes(self) -> int:
        """Size of all changes in bytes."""
        return sum(change.nbytes for change in self.changes.values())

    def vector(self) -> TaskVector[EditDelta]:
        """Return the weight differences as a task vector in fp32, for arithmetic.

        Raises:
            EditError: a changed tensor contains no floating-point numbers.
        """
        base = {}
        for name, change in self.changes.items():
            values, known = change.partial_base()
            base[name] = BaseTensor(values, known, change.base, change.tied)
        return TaskVector(
            {name: change.difference() for name, change in self.changes.items()},
            base=base,
            about=self.meta["base"],
            parents=(self.meta.get("edits", {}),),
            delta_type=EditDelta,
        )

    def __add__(self, other: Any) -> TaskVector[EditDelta]:
        return self.vector() + other

    def __sub__(self, other: Any) -> TaskVector[EditDelta]:
        return self.vector() - other

    def __neg__(self) -> TaskVector[EditDelta]:
        return -self.vector()

    def __mul__(self, factor: float) -> TaskVector[EditDelta]:
        return self.vector() * factor

    __rmul__ = __mul__

    def __len__(self) -> int:
        return len(self.changes)

    def __repr__(self) -> str:
        layouts = ", ".join(f"{name} ({change.layout})" for name, change in list(self.changes.items())[:3])
        more = ", ..." if len(self) > 3 else ""
        return f"EditDelta({plural(len(self), 'tensor')}, {self.nbytes / 1e6:.2f} MB: {layouts}{more})"

    def _repr_html_(self) -> str:
        return fragment(paragraph(repr(self)) + "".join(drift_section(self.norms())))

    def _targets(self, model: Any) -> list[tuple[str, Tensor]]:
        """Return a pair (name in the delta, tensor of the model) for each model tensor that the delta changes."""
        if isinstance(model, nn.Module):
            reshard(model)
            named = named_tensors(model)
        elif isinstance(model, Mapping):
            named = dict(model)
        else:
            raise EditError(f"model must be a module or a state dict, got {type(model).__name__}.")
        groups = {name: (first, *others) for first, others in grouped(named).items() for name in (first, *others)}
        separate = set(self.meta["base"]["names"])
        targets: dict[str, tuple[str, Tensor]] = {}
        for name, change in self.changes.items():
            present = [alias for alias in (name, *change.tied) if alias in named]
            if not present:
                hint = (
                    ". This model has an adapter: merge or remove it (in PEFT: merge_and_unload() or unload()), and "
                    "use the model that this call returns"
                    if hasattr(model, "peft_config")
                    else ""
                )
                raise EditError(
                    f"the model has no tensor {name!r}, which the delta changes; use the model for which the delta was "
                    f"made{hint}."
                )
            for alias in present:
                for other in groups[alias]:
                    if other in separate and other != name:
                        raise EditError(
                            f"the model ties {alias} to {other}, but the base model has two separate tensors, so the "
                            "delta would change both tensors; load the model with tie_word_embeddings=False."
                        )
                targets.setdefault(groups[alias][0], (name, named[alias]))
        return list(targets.values())

    @torch.no_grad()
    def _write(self, model: Any, to: State) -> Any:
        targets = self._targets(model)
        for name, tensor in targets:
            self.changes[name].require("base" if to == "edited" else "edited", name, _on_cpu(tensor))
        for name, tensor in targets:
            change = self.changes[name]
            value = change.replaced(_on_cpu(tensor), change.after if to == "edited" else change.before)
            tensor.copy_(shard_like(value.to(tensor.device), tensor))
        return model


def _on_cpu(tensor: Tensor) -> Tensor:
    return full_tensor(tensor.detach()).cpu()
