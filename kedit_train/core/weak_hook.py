"""Hooks that call a method of an object without keeping the object alive."""

from __future__ import annotations

import weakref
from typing import Any


def weak_hook(method: Any) -> Any:
    """Return a function that calls a bound method while its object exists, and does nothing afterwards."""
    reference = weakref.WeakMethod(method)

    def hook(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*args)

    return hook
