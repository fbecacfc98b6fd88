"""What a format is to the loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.edit import Edit


@dataclass(frozen=True)
class Format:
    """One way of writing edits down.

    Args:
        name: what ``EditDataset.load(format=...)`` calls it.
        recognise: whether a record's keys are those of this format.
        read: one record -> its edits (MQuAKE has up to four in one record).
        reads: top-level fields that end up in the edits.
        ignores: top-level fields that are known and left out; the reader's docstring says why.
        structured: fields that hold lists or mappings; a CSV cell holds them as JSON, or as ``a|b|c``.
    """

    name: str
    recognise: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], list[Edit]]
    reads: frozenset[str]
    ignores: frozenset[str] = frozenset()
    structured: frozenset[str] = frozenset()


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())
