"""Read model inputs from a list or a safetensors file, for models whose inputs are not texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_train.core.cache.sequence_keys import hash_content
from kedit_train.core.drift.model_batches import holds_model_inputs
from kedit_train.errors import EditError
from kedit_train.safetensors_file import load_tensors

_EXPECTED = "a list of model inputs with one item per forward pass (a tensor, or a tuple or mapping of tensors)"


def read_model_inputs(source: Any, argument: str) -> list[Any]:
    """Return the inputs of a model as a list with one item per forward pass.

    Args:
        source: an iterable, or the path of a safetensors file. An iterable contains one item per forward pass: a
            tensor, or a tuple or mapping of tensors. A file contains one tensor per argument that is passed to
            ``forward``. Each tensor has the name of its argument and the shape [forward passes, ...].
        argument: name of the argument that holds ``source``, for error messages.

    Raises:
        EditError: the source has another form or contains no item. A single tensor is not accepted; put it in a list.

    Example:
        >>> read_model_inputs(torch.zeros(6, 3).split(2), "inputs")[0].shape
        torch.Size([2, 3])
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(source), argument)
    if isinstance(source, Tensor):
        raise EditError(
            f"{argument} must be {_EXPECTED}, got one tensor of shape {tuple(source.shape)}; pass {argument}=[tensor], "
            f"or {argument}=tensor.split(32) for forward passes with 32 samples each."
        )
    items = list(source) if isinstance(source, Iterable) and not isinstance(source, Mapping) else []
    if not holds_model_inputs(items):
        got = f"items of type {type(items[0]).__name__}" if items else type(source).__name__
        if not items and isinstance(source, list | tuple):
            got = "an empty list"
        elif not items and isinstance(source, Iterator):
            got = "an iterator without items (it can be read only once)"
        raise EditError(f"{argument} must be {_EXPECTED}, got {got}; set {argument}= to the inputs of the model.")
    return items


def hash_model_inputs(items: Iterable[Any]) -> str:
    """Return a hash of ``items``. The same items in another order have another hash."""
    return hash_content(*(part for item in items for part in _parts(item)))


def _read_file(path: Path, argument: str) -> list[Any]:
    if path.suffix != ".safetensors":
        raise EditError(f"{argument} must be {_EXPECTED}, or the path of a .safetensors file, got {str(path)!r}.")
    tensors = load_tensors(path, kind="kedit_train.model_inputs", memory_map=False, allow_unsigned=True).tensors
    lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if not lengths or min(lengths.values()) == 0 or len(set(lengths.values())) > 1:
        raise EditError(
            f"all tensors in {path} must have the same first dimension (the number of forward passes), got "
            f"{lengths}; write tensors of the shape [forward passes, samples, ...]."
        )
    return [dict(zip(tensors, values, strict=True)) for values in zip(*tensors.values(), strict=True)]


def _parts(value: Any) -> Iterable[bytes | Tensor]:
    if isinstance(value, Tensor):
        dense = value.detach().cpu()
        yield f"\n{value.dtype} {tuple(value.shape)} ".encode()
        yield dense if dense.numel() else torch.zeros(1)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield f"\n{name}:".encode()
            yield from _parts(inner)
    elif isinstance(value, tuple | list):
        yield f"\n{len(value)} values".encode()
        for inner in value:
            yield from _parts(inner)
    elif hasattr(value, "__array__"):
        # The repr() of a large NumPy array leaves out most of its numbers, so the array itself is hashed.
        yield from _parts(torch.as_tensor(value))
    else:
        yield f"\n{value!r}".encode()
