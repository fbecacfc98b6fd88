"""The description of a format that a reader can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.edit import Edit


@dataclass(frozen=True)
class Format:
    """A format of records.

    Args:
        name: the name for ``EditDataset.load(format=...)``.
        recognize: returns whether the keys of a record are those of this format.
        read: turns one record into its edits. A record of MQuAKE has up to four.
        reads: top-level fields that end up in the edits.
        ignores: top-level fields that are known and left out; the docstring of ``read`` says why.
        structured: fields that hold lists or mappings. In a CSV file, a cell holds them as JSON or as ``a|b|c``.
    """

    name: str
    recognize: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], list[Edit]]
    reads: frozenset[str]
    ignores: frozenset[str] = frozenset()
    structured: frozenset[str] = frozenset()


def field_names(text: str) -> frozenset[str]:
    """Return the names in a text that separates them by spaces."""
    return frozenset(text.split())
