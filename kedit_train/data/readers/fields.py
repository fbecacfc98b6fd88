"""Read the fields of one record, and check their types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kedit_train.data.tokenization import shorten
from kedit_train.data.visible import is_visible
from kedit_train.errors import EditError

REMEDY = 'correct the record, or pass on_error="skip" to leave out records with errors'


def quoted(names: Iterable[object]) -> str:
    """Return the names for a message: in quotes, on one line, and cut if they are long or many.

    The names come from a file, so they can contain any characters.

    Example:
        >>> quoted(["prompt", "a\\nb"])
        "'prompt', 'a b'"
    """
    listed = [repr(shorten(str(name), 100)) for name in names]
    more = f" and {len(listed) - 20} others" if len(listed) > 20 else ""
    return ", ".join(listed[:20]) + more


def describe(value: object) -> str:
    """Return the type of a JSON value in words, such as "null", "text", "an empty string" or "a number"."""
    if value is None:
        return "null"
    if isinstance(value, str):
        if is_visible(value):
            return "text"
        if not value:
            return "an empty string"
        return "only invisible characters" if value.strip() else "only white space"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    return f"a {type(value).__name__}"


def is_blank(value: object) -> bool:
    """Return whether a value is null, or text without any visible character."""
    return value is None or (isinstance(value, str) and not is_visible(value))


class Fields:
    """The fields of a record, or of a mapping inside a record. Each method that reads a field checks its type.

    An optional field may be missing, null or blank. A value of a wrong type raises a one-line ``EditError``. If a
    method is called with several keys, they are alternative names of one field. The method reads the first key that has
    a value.

    Args:
        values: the record.
        where: the beginning of every error message, for example ``"edits.json, record 17"``. Records are counted from
            1.
        path: the position of these values in the record, for example ``"requested_rewrite[0]."``.
    """

    def __init__(self, values: Mapping[str, Any], where: str, path: str = "") -> None:
        self.values = values
        self.where = where
        self.path = path

    def error(self, key: str, expected: str, got: str) -> EditError:
        """Return the error for a field with a wrong value."""
        return EditError(f"{self.where}: field {quoted([self.path + key])} must be {expected}, got {got}; {REMEDY}")

    def missing(self, keys: tuple[str, ...], expected: str) -> EditError:
        """Return the error for a field that is missing."""
        names = " or ".join(quoted([self.path + key]) for key in keys)
        return EditError(f"{self.where}: field {names} must be {expected}, but is missing; {REMEDY}")

    def _pick(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """Return the key to read and its value: the first key with a value, or else the first key that exists."""
        existing = [key for key in keys if key in self.values]
        filled = [key for key in existing if not is_blank(self.values[key])]
        key = (filled or existing or [keys[0]])[0]
        return key, self.values.get(key)

    def has(self, *keys: str) -> bool:
        """Return whether one of the keys has a value."""
        return not is_blank(self._pick(keys)[1])

    def text(self, *keys: str) -> str:
        """Return a required text, unchanged."""
        key, value = self._pick(keys)
        if key not in self.values:
            raise self.missing(keys, "text")
        if not isinstance(value, str) or not is_visible(value):
            raise self.error(key, "text", describe(value))
        return value

    def answer(self, *keys: str) -> str:
        """Return a required text without leading and trailing white space. Tokenization adds a space if needed."""
        return self.text(*keys).strip()

    def optional_text(self, *keys: str) -> str | None:
        """Return an optional text, or None if it is missing."""
        return self.text(*keys) if self.has(*keys) else None

    def identifier(self, *keys: str) -> str:
        """Return the identifier of the record (text or a whole number) as text, or empty text if there is none."""
        key, value = self._pick(keys)
        if not self.has(*keys):
            return ""
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            got = "a decimal number" if isinstance(value, float) else describe(value)
            raise self.error(key, "text or a whole number", got)
        return str(value)

    def texts(self, *keys: str) -> tuple[str, ...]:
        """Return the unchanged texts of an optional field, which contains one text or a list of texts."""
        if not self.has(*keys):
            return ()
        key, value = self._pick(keys)
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, (list, tuple)):
            raise self.error(key, "text or a list of texts", describe(value))
        for i, item in enumerate(value):
            if not isinstance(item, str) or not is_visible(item):
                raise self.error(f"{key}[{i}]", "text", describe(item))
        return tuple(value)

    def answers(self, *keys: str) -> tuple[str, ...]:
        """Return the distinct right answers in an optional field.

        The field contains a text, a list of texts, or a list of lists. Each inner list contains the aliases of one
        answer.
        """
        key, value = self._pick(keys)
        if not isinstance(value, (list, tuple)):
            texts = list(self.texts(*keys))
        else:
            texts = []
            for i, item in enumerate(value):
                name = f"{key}[{i}]"
                fields = Fields({name: item}, self.where, self.path)
                texts += fields.texts(name) if isinstance(item, (list, tuple)) else [fields.text(name)]
        return tuple(dict.fromkeys(text.strip() for text in texts))

    def child(self, key: str) -> Fields:
        """Return the fields of a required mapping."""
        if key not in self.values:
            raise self.missing((key,), "a mapping")
        value = self.values[key]
        if not isinstance(value, Mapping):
            raise self.error(key, "a mapping", describe(value))
        return Fields(value, self.where, f"{self.path}{key}.")

    def children(self, key: str, *, required: bool = False) -> list[Fields]:
        """Return one ``Fields`` object for each mapping in the list at ``key``."""
        value = self.values.get(key)
        if not required and is_blank(value):
            return []
        if required and key not in self.values:
            raise self.missing((key,), "a list of mappings")
        if not isinstance(value, (list, tuple)) or (required and not value):
            raise self.error(key, "a list of mappings", describe(value))
        for i, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise self.error(f"{key}[{i}]", "a mapping", describe(item))
        return [Fields(item, self.where, f"{self.path}{key}[{i}].") for i, item in enumerate(value)]

    def kinds(self, key: str) -> dict[str, list[Fields]]:
        """Read a mapping whose keys are kinds of probes and whose values are lists of mappings.

        Returns:
            A dict with one list of ``Fields`` for each kind. A kind with an empty list is left out.
        """
        if not self.has(key):
            return {}
        kinds = self.child(key)
        children = {str(kind): kinds.children(kind) for kind in kinds.values}
        return {kind: items for kind, items in children.items() if items}
