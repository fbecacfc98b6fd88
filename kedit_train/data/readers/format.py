"""The description of a data format: its name, its fields and its reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.edit import Edit


@dataclass(frozen=True)
class Format:
    """A data format for records.

    Args:
        name: the name for ``EditDataset.load(format=...)``.
        recognize: function that returns whether the keys of a record are those of this format.
        read: function that converts one record to edits. A record of MQuAKE contains up to four edits. A record of any
            other format contains one edit.
        reads: names of the top-level fields that are stored in the edits.
        ignores: names of the top-level fields that are known but not read.
        structured: names of the fields that contain lists or mappings. In a CSV file, a cell of such a field contains
            JSON or texts separated by ``|``.
        ignored_prefixes: top-level fields whose names begin with one of these texts are known but not read.
        extends: names of other formats. If one of them also recognizes a record of this format, the record counts only
            as a record of this format.
    """

    name: str
    recognize: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], list[Edit]]
    reads: frozenset[str]
    ignores: frozenset[str] = frozenset()
    structured: frozenset[str] = frozenset()
    ignored_prefixes: tuple[str, ...] = ()
    extends: frozenset[str] = frozenset()

    def unknown(self, record: Mapping[str, Any]) -> set[str]:
        """Return the names of the fields of a record that this format does not know."""
        others = set(record) - self.reads - self.ignores
        return {key for key in others if not str(key).startswith(self.ignored_prefixes)}


def field_names(text: str) -> frozenset[str]:
    """Split a text of field names at the spaces, and return the set of names."""
    return frozenset(text.split())
