"""Read prompts, with or without responses, from a list or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedit_train.arguments import cut
from kedit_train.data.readers.files import read_file, read_text
from kedit_train.errors import EditError


def read_records(prompts: Any) -> list[dict[str, str]]:
    """Read prompts from a list or a file, and return one record per prompt.

    Each record has the key ``prompt``. If the list or file contains responses, each record also has the key
    ``response``.
    """
    where = "prompts"
    if isinstance(prompts, str | Path):
        where, path = str(prompts), Path(prompts)
        is_text = path.suffix.lower() == ".txt"
        prompts = [line for line in read_text(path).splitlines() if line.strip()] if is_text else read_file(path)
    if not isinstance(prompts, Sequence) or not prompts:
        raise EditError(f"prompts must be a file or a non-empty list, got {cut(repr(prompts), 100)}.")
    records: list[dict[str, str]] = []
    for number, entry in enumerate(prompts, 1):
        record = {"prompt": entry} if isinstance(entry, str) else entry
        keys = [key for key in ("prompt", "response") if isinstance(record, Mapping) and key in record]
        if "prompt" not in keys or not all(isinstance(record[key], str) and record[key].strip() for key in keys):
            raise EditError(
                f"{where}, record {number}: expected a prompt, or a record with the key prompt and optionally the key "
                f"response, both with a non-empty text, got {cut(repr(entry), 60)}; correct this record."
            )
        records.append({key: record[key] for key in keys})
        if len(records[0]) != len(keys):
            raise EditError(
                f"{where}, record {number}: either all records or none must have a response, but this record has "
                f"{'a' if 'response' in keys else 'no'} response, unlike the first record; add the missing responses, "
                "or use two files."
            )
    return records
