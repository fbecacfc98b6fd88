"""The file of measured trials, which lets an interrupted ``tune`` continue without measuring anything twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedit_train.errors import EditError


class Journal:
    """A JSONL file with one measured trial per line.

    The key of a trial is a hash of everything that the trial depends on. A line is flushed to disk as soon as its trial
    is measured. If the process was killed while it wrote a line, this line is left out when the file is read.

    Args:
        path: the file. It is created when the first trial is added.

    Raises:
        EditError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        try:
            content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        except OSError as error:
            raise EditError(f"{path} cannot be read ({error.strerror}); call tune with another folder.") from error
        for line in content.split("\n"):
            record = _parse(line)
            if record is not None:
                self._records[record["key"]] = record
        # A new line must not continue an incomplete line.
        self._separator = "\n" if content and not content.endswith("\n") else ""

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record with this key, or None."""
        return self._records.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Append a record to the file, and flush it to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **record}, ensure_ascii=False, allow_nan=False)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(f"{self._separator}{line}\n")
            file.flush()
            os.fsync(file.fileno())
        self._separator = ""
        self._records[key] = {"key": key, **record}


def key_of(parts: Mapping[str, Any]) -> str:
    """Return a hash of a dict of JSON values, as 64 hexadecimal digits. The order of the keys does not matter.

    Example:
        >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("key"), str) else None
