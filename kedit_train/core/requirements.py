"""Check that every callback finds what it requires, and that no two callbacks conflict.

A callback names the metrics and capabilities that it requires, but not the classes of the callbacks that provide them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kedit_train.errors import EditError


@dataclass(frozen=True)
class Requirement:
    """A requirement or a conflict of one callback.

    ``EditCallback.requires()`` returns requirements: a callback of the run (this callback or another one) must provide
    at least one of the names. ``EditCallback.conflicts()`` returns conflicts: no other callback of the run may provide
    any of the names.

    Args:
        any_of: the names. A name is the key of a published metric (``"edit/reliability"``) or a capability
            (``"token_loss"``, ``"token_clip"``, ``"batch_anchor"``).
        message: the error message. It says in one sentence what is wrong and what to do.
    """

    any_of: tuple[str, ...]
    message: str


def check_duplicates(callbacks: Sequence[Any]) -> None:
    """Raise an error if there are two callbacks of a class that may be used only once on a model.

    Raises:
        EditError: the message ends with the ``duplicate_hint`` of the class.
    """
    classes: set[type] = set()
    for callback in callbacks:
        if callback.duplicate_hint and type(callback) in classes:
            raise EditError(
                f"there are two callbacks of this class on this model; {callback.duplicate_hint}.",
                component=type(callback).__name__,
            )
        classes.add(type(callback))


def check_requirements(callbacks: Sequence[Any]) -> None:
    """Raise an error for the first unmet requirement or the first conflict between the callbacks.

    Raises:
        EditError: a requirement is not met, or two callbacks conflict. The message says what to add or remove.
    """
    provided = {name for callback in callbacks for name in callback.provides()}
    for callback in callbacks:
        for requirement in callback.requires():
            if not provided.intersection(requirement.any_of):
                raise EditError(requirement.message, component=type(callback).__name__)
    check_conflicts(callbacks)


def check_conflicts(callbacks: Sequence[Any]) -> None:
    """Raise an error for the first conflict between two callbacks.

    Raises:
        EditError: the message says what to remove.
    """
    for callback in callbacks:
        others = {name for other in callbacks if other is not callback for name in other.provides()}
        for conflict in callback.conflicts():
            if others.intersection(conflict.any_of):
                raise EditError(conflict.message, component=type(callback).__name__)
