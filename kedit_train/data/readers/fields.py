"""Checked access to one record: a wrong field becomes one line that names file, record, field and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_train.errors import EditError

REMEDY = 'mend the record, or pass on_error="skip" to leave such records out'


def describe(value: object) -> str:
    """What a JSON value is, in a reader's words: ``"null"``, ``"text"``, ``"a number"``, ..."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text" if value.strip() else "empty"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"of type {type(value).__name__}"


class Fields:
    """One record, or a mapping inside it. Every method raises a one-line ``EditError`` for what is malformed.

    An optional field that is missing, null or blank is absent, which is fine; of the wrong type it is an error.
    Where a method takes several keys, they are alternative names of one field, and the first that is there counts.

    Args:
        values: the record.
        where: what precedes the message, e.g. ``"edits.json, record 17"`` (records are counted from 1).
        path: where in the record these values are, e.g. ``"requested_rewrite[0]."``.
    """

    def __init__(self, values: Mapping[str, Any], where: str, path: str = "") -> None:
        self.values = values
        self.where = where
        self.path = path

    def error(self, key: str, problem: str, expected: str) -> EditError:
        return EditError(f"{self.where}: field '{self.path}{key}' {problem} (expected {expected}): {REMEDY}")

    def _pick(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """The first key with something in it, else the first that is there at all."""
        there = [key for key in keys if key in self.values]
        filled = [key for key in there if describe(self.values[key]) not in ("null", "empty")]
        key = (filled or there or [keys[0]])[0]
        return key, self.values.get(key)

    def has(self, *keys: str) -> bool:
        return describe(self._pick(keys)[1]) not in ("null", "empty")

    def text(self, *keys: str) -> str:
        """A text that must be there and not blank, as written."""
        key, value = self._pick(keys)
        if key not in self.values:
            or_else = "".join(f" (or '{other}')" for other in keys[1:])
            raise EditError(f"{self.where}: field '{self.path}{key}'{or_else} is missing (expected text): {REMEDY}")
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, f"is {describe(value)}", "text")
        return value

    def answer(self, *keys: str) -> str:
        """A text that must be there, without the white space around it: the separator decides that."""
        return self.text(*keys).strip()

    def optional_text(self, *keys: str) -> str | None:
        return self.text(*keys) if self.has(*keys) else None

    def identity(self, *keys: str) -> str:
        """The record's own identifier as text; numbers are usual here."""
        key, value = self._pick(keys)
        if not self.has(*keys):
            return ""
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise self.error(key, f"is {describe(value)}", "text or a whole number")
        return str(value)

    def texts(self, *keys: str) -> tuple[str, ...]:
        """None, one text or a list of texts, as written."""
        if not self.has(*keys):
            return ()
        key, value = self._pick(keys)
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, (list, tuple)):
            raise self.error(key, f"is {describe(value)}", "text or a list of texts")
        for i, item in enumerate(value):
            if not isinstance(item, str) or not item.strip():
                raise self.error(f"{key}[{i}]", f"is {describe(item)}", "text")
        return tuple(value)

    def answers(self, *keys: str) -> tuple[str, ...]:
        """None, one text, a list of texts or a list of alias lists, as one tuple: any of them counts as right."""
        key, value = self._pick(keys)
        found: list[str] = []
        for i, item in enumerate(value if isinstance(value, (list, tuple)) else ()):
            inside = Fields({f"{key}[{i}]": item}, self.where, self.path)
            found += inside.texts(f"{key}[{i}]") if isinstance(item, (list, tuple)) else [inside.text(f"{key}[{i}]")]
        if not isinstance(value, (list, tuple)):
            found += self.texts(*keys)
        return tuple(dict.fromkeys(text.strip() for text in found))

    def child(self, key: str) -> Fields:
        """A mapping that must be there."""
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            problem = f"is {describe(value)}" if key in self.values else "is missing"
            raise self.error(key, problem, "a mapping")
        return Fields(value, self.where, f"{self.path}{key}.")

    def children(self, key: str, *, required: bool = False) -> list[Fields]:
        """A list of mappings."""
        value = self.values.get(key)
        if not required and describe(value) in ("null", "empty"):
            return []
        if not isinstance(value, (list, tuple)) or (required and not value):
            problem = "is missing" if key not in self.values else f"is {describe(value or None)}"
            raise self.error(key, "is an empty list" if value in ([], ()) else problem, "a list of mappings")
        for i, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise self.error(f"{key}[{i}]", f"is {describe(item)}", "a mapping")
        return [Fields(item, self.where, f"{self.path}{key}[{i}].") for i, item in enumerate(value)]

    def kinds(self, key: str) -> dict[str, list[Fields]]:
        """A mapping from kind to a list of mappings; kinds without any are left out."""
        if not self.has(key):
            return {}
        inside = self.child(key)
        found = {str(kind): inside.children(kind) for kind in inside.values}
        return {kind: items for kind, items in found.items() if items}
