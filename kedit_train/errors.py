"""The error class and the warning function of this package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_component: ContextVar[str | None] = ContextVar("kedit_train_component", default=None)


class EditError(ValueError):
    """The edit cannot be carried out as requested.

    The message is one line that says what is wrong and what to do. Where possible, the error is raised before the first
    optimizer step.

    Args:
        message: one line: what was expected, what was given, what to do.
        component: the name of the class or function that the message is about. The name is printed in front of the
            message. If ``component`` is None, the innermost :func:`reported_by` block sets it.

    Example:
        >>> raise EditError("loss must be > 0, got -1.", component="StopWhenEdited")
        Traceback (most recent call last):
        ...
        kedit_train.errors.EditError: StopWhenEdited: loss must be > 0, got -1.
    """

    def __init__(self, message: str, component: str | None = None) -> None:
        super().__init__(message)
        self.component = component

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.component is None else f"{self.component}: {message}"


@contextmanager
def reported_by(component: str) -> Iterator[None]:
    """Context manager: put ``component`` in front of every :class:`EditError` and :func:`warn` message.

    An error that already has a component keeps that component.

    Args:
        component: the name of a class or function.

    Example:
        >>> with reported_by("evaluate"):
        ...     raise EditError("edits must not be empty.")
        Traceback (most recent call last):
        ...
        kedit_train.errors.EditError: evaluate: edits must not be empty.
    """
    token = _component.set(component)
    try:
        yield
    except EditError as error:
        if error.component is None:
            error.component = component
        raise
    finally:
        _component.reset(token)


def warn(message: str) -> None:
    """Issue a ``UserWarning`` that starts with the component set by :func:`reported_by`.

    Args:
        message: one line that says what is wrong and what to do.
    """
    component = _component.get()
    warnings.warn(message if component is None else f"{component}: {message}", stacklevel=3)
