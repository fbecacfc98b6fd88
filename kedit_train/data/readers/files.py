"""Read the records of a file. An invalid line is returned as an error object, so that the caller can skip the line."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kedit_train.data.readers.fields import REMEDY, describe, quoted
from kedit_train.data.readers.json_text import InvalidJSON, parse_json
from kedit_train.errors import EditError
from kedit_train.paths import why_no_file

SUFFIXES = (".json", ".jsonl", ".csv")
# The keys under which a JSON file may keep its list of records.
LIST_KEYS = ("data", "records", "edits")
# By default, the csv module accepts cells of at most 131072 characters. The limit here is the largest limit that is
# possible on every platform.
_CELL_LENGTH = 2**31 - 1


def read_file(path: Path) -> list[Any]:
    """Read the records of a ``.json``, ``.jsonl`` or ``.csv`` file, in order.

    Args:
        path: a UTF-8 file, with or without byte order mark. A JSON file contains a list of records, or a mapping with
            such a list under the key ``data``, ``records`` or ``edits``. A JSONL file has one record per line; blank
            lines are skipped. In a CSV file, the first row names the fields, and an empty cell is a missing field.

    Returns:
        A list with one item per record. A valid record is a mapping. A JSON value that is not a mapping is returned
        unchanged. For a JSONL line that is not JSON, and for a CSV row with a wrong number of cells, the item is an
        ``EditError`` (not raised).

    Raises:
        EditError: the file is missing, empty, not UTF-8 text, or not valid JSON or CSV. The error is also raised if the
            name of the file does not have one of the three endings.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise EditError(f"{path}: the file name must end in one of {', '.join(SUFFIXES)}; rename or convert the file")
    text = read_text(path)
    if not text.strip():
        raise EditError(f"{path}: the file is empty; add at least one record with a prompt and a target")
    if suffix == ".json":
        records = read_json(path, text)
    elif suffix == ".csv":
        records = read_csv(path)
    else:
        records = read_jsonl(path, text)
    if not records:
        raise EditError(f"{path}: the file has no records; add at least one record with a prompt and a target")
    return records


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with or without byte order mark.

    Raises:
        EditError: the file is missing, cannot be read, or is not UTF-8 text.
    """
    try:
        if not path.is_file():
            raise EditError(f"{path}: the file {why_no_file(path)} (working directory: {Path.cwd()})")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EditError(f"{path}: the file cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise EditError(
            f"{path}: the file must be UTF-8 text, got an invalid byte at position {error.start}; save the file as "
            "UTF-8"
        ) from error


def read_json(path: Path, text: str) -> list[Any]:
    """Parse a JSON file and return its list of records."""
    try:
        content = parse_json(text)
    except InvalidJSON as error:
        hint = "; a file with one record per line must end in .jsonl" if error.reason == "Extra data" else ""
        where = str(path) if error.line is None else f"{path}, line {error.line}"
        raise EditError(f"{where}: the file is not valid JSON ({error.reason}); correct the file{hint}") from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in LIST_KEYS if isinstance(content.get(key), list)), content)
        if isinstance(content, Mapping) and content and all(map(_is_uniedit, content.values())):
            content = [{"id": key, **record} for key, record in content.items()]
    if not isinstance(content, list):
        keys = f" with the keys {quoted(content)}" if isinstance(content, Mapping) else ""
        raise EditError(
            f"{path}: the file must contain a list of records, or a mapping with such a list under one of the keys "
            f"{', '.join(LIST_KEYS)}, got {describe(content)}{keys}; put the records into a list"
        )
    return content


def _is_uniedit(record: object) -> bool:
    """Return whether a value is a record of UniEdit, whose files are mappings from identifiers to records."""
    return isinstance(record, Mapping) and isinstance(record.get("edit"), Mapping)


def read_jsonl(path: Path, text: str) -> list[Any]:
    """Parse a JSONL file. A line that is not JSON becomes an ``EditError``."""
    records: list[Any] = []
    # splitlines() would also split at U+2028 and similar characters, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(parse_json(line))
        except InvalidJSON as error:
            where = f"{path}, record {len(records) + 1} (line {number})"
            reason = error.reason if error.column is None else f"{error.reason} at column {error.column}"
            records.append(EditError(f"{where}: the line is not valid JSON ({reason}); {REMEDY}"))
    return records


def read_csv(path: Path) -> list[Any]:
    """Parse a CSV file. A row with the wrong number of cells becomes an ``EditError``."""
    records: list[Any] = []
    with path.open(encoding="utf-8-sig", newline="") as file, _long_cells():
        rows = csv.reader(file, strict=True)
        try:
            names = [name.strip() for name in next(rows)]
            repeated = [name for name, count in Counter(names).items() if count > 1]
            if repeated:
                name = quoted(repeated[:1])
                raise EditError(f"{path}: the column {name} appears twice; rename one of the two columns")
            for cells in rows:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(names):
                    where = f"{path}, record {len(records) + 1} (line {rows.line_num})"
                    quotes = "a text with a comma must be in quotes"
                    problem = f"the row must have {len(names)} cells, got {len(cells)} ({quotes})"
                    records.append(EditError(f"{where}: {problem}; {REMEDY}"))
                    continue
                row = zip(names, cells, strict=True)
                records.append({name: cell for name, cell in row if cell.strip()})
        except csv.Error as error:
            raise EditError(
                f"{path}, line {rows.line_num}: the file is not valid CSV ({error}); correct the file"
            ) from error
    return records


@contextmanager
def _long_cells() -> Iterator[None]:
    """Context manager: let the csv module read cells of any length.

    The csv module has one length limit for the whole process. The old limit is restored afterwards.
    """
    limit = csv.field_size_limit(_CELL_LENGTH)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def decode_cells(record: Mapping[str, Any], structured: frozenset[str], where: str) -> dict[str, Any]:
    """Decode the CSV cells that contain lists or mappings.

    Args:
        record: the cells of one row, by field name.
        structured: the names of the fields that contain lists or mappings. If a cell of such a field begins with ``[``
            or ``{``, it is read as JSON. Otherwise it is read as texts that are separated by ``|``.
        where: the beginning of every error message.

    Raises:
        EditError: a cell is not valid JSON.
    """
    decoded = dict(record)
    for key in structured & record.keys():
        cell = record[key].strip()
        if not cell.startswith(("[", "{")):
            decoded[key] = [part.strip() for part in cell.split("|")]
            continue
        try:
            decoded[key] = parse_json(cell)
        except InvalidJSON as error:
            raise EditError(
                f"{where}: field '{key}' must be a JSON list or mapping, or texts separated by |, got invalid "
                f"JSON ({error.reason}); {REMEDY}"
            ) from error
    return decoded
