"""The arguments of callbacks as plain values, for the configuration of a logged run."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kedit_train.data import EditDataset
from kedit_train.edit import Edit

# A collection with more items, such as a list of texts, is replaced by its length.
_LONGEST = 20
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def callback_arguments(callbacks: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Return the constructor arguments of each callback as plain values.

    - Numbers, texts and None are returned unchanged. A NumPy number becomes a Python number.
    - A path, a dtype or a device becomes a text, and a dataclass becomes a dict of its fields.
    - A data set or list of edits becomes a dict with the name, the hash and the number of edits.
    - The items of a short collection are converted one by one. A long collection becomes a text with its length.
    - Any other object becomes the name of its class.

    Args:
        callbacks: instances of callbacks. The value of an argument is read from the attribute with the same name.

    Returns:
        A dict from the name of the class to a dict from argument to value. If there are several callbacks of one class,
        the second is called "Name 2", the third "Name 3", and so on.

    Example:
        >>> from kedit_train.callbacks import NormBall
        >>> callback_arguments([NormBall(0.5)])
        {'NormBall': {'radius': 0.5, 'norm': 'linf', 'per': 'tensor', 'anchor': 'base', 'fraction': 0.6}}
    """
    found: dict[str, dict[str, Any]] = {}
    for callback in callbacks:
        kind = type(callback).__name__
        name, count = kind, 1
        while name in found:
            count += 1
            name = f"{kind} {count}"
        names = [p.name for p in inspect.signature(type(callback)).parameters.values() if p.kind not in _VARIADIC]
        found[name] = {name: plain(getattr(callback, name)) for name in names if hasattr(callback, name)}
    return found


def plain(value: Any) -> Any:
    """Convert a value to a value that JSON can store. :func:`callback_arguments` lists the rules."""
    # np.float64 is also a float.
    if isinstance(value, np.generic):
        return plain(value.item())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    is_list = isinstance(value, Sequence | Set)
    if is_list and value and all(isinstance(item, Edit) for item in value):
        edits = value if isinstance(value, EditDataset) else EditDataset(value)
        return {"name": edits.name, "hash": edits.hash, "edits": len(edits)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    name = type(value).__name__
    if (is_list or isinstance(value, Mapping)) and len(value) > _LONGEST:
        return f"{name} of {len(value)} items"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if is_list else name
