"""Read the arguments of a callback from a field of a trainer's configuration."""

from __future__ import annotations

import inspect
from typing import Any

from kedit_train.arguments import cut
from kedit_train.callbacks.base import EditCallback
from kedit_train.errors import EditError
from kedit_train.safetensors_header import parse_json


def callback_arguments(name: str, callback_class: type[EditCallback], value: Any) -> dict[str, Any] | None:
    """Convert the value of a configuration field into arguments of a callback.

    Returns:
        The arguments, or None if the callback should not be added.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise EditError(
                f"{name} must be a JSON object such as '{{}}', got {cut(repr(value), 80)} ({error}).", "EditSFTConfig"
            ) from error
    if value is None or value is False:
        return None
    value = {} if value is True else value
    if not isinstance(value, dict):
        raise EditError(
            f"{name} must be a mapping of arguments of {callback_class.__name__}, or true to use the default "
            f"arguments, got {value!r}.",
            component="EditSFTConfig",
        )
    known = list(inspect.signature(callback_class).parameters)
    unknown = [key for key in value if key not in known]
    if unknown:
        raise EditError(
            f"{name}: {callback_class.__name__} has no argument {unknown[0]!r}; use one of {', '.join(known)}.",
            component="EditSFTConfig",
        )
    return value
