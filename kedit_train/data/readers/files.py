"""Files -> records. A line that cannot be parsed is returned as its error, so that the caller may skip it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedit_train.data.readers.fields import REMEDY
from kedit_train.errors import EditError

SUFFIXES = (".json", ".jsonl", ".csv")
WRAPPERS = ("data", "records", "edits")  # names under which a JSON file may keep its list


def read_file(path: Path) -> list[Any]:
    """The records of a ``.json``, ``.jsonl`` or ``.csv`` file, in order.

    Args:
        path: UTF-8, with or without byte order mark. JSON: a list, or a mapping with the list under ``data``,
            ``records`` or ``edits``. JSONL: blank lines are no records. CSV: the first row names the fields; an
            empty cell is an absent field.

    Returns:
        One mapping per record (or whatever else JSON held there; the caller checks), and an ``EditError`` in the
        place of a line that is no JSON or a row with too many or too few cells.

    Raises:
        EditError: the file is missing, of another kind, not text, empty or broken as a whole.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise EditError(f"{path}: files of edits end in {', '.join(SUFFIXES)}: rename or convert it")
    if not path.is_file():
        raise EditError(f"{path}: there is no such file: check the path (working directory: {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EditError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if not text.strip():
        raise EditError(f"{path}: the file is empty: an edit needs at least a prompt and a target")
    kind = path.suffix.lower()
    records = read_json(path, text) if kind == ".json" else read_csv(path) if kind == ".csv" else read_jsonl(path, text)
    if not records:
        raise EditError(f"{path}: the file holds no records: an edit needs at least a prompt and a target")
    return records


def read_json(path: Path, text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs into a .jsonl file" if error.msg == "Extra data" else ""
        raise EditError(f"{path}, line {error.lineno}: not JSON ({error.msg}): mend the file{hint}") from error
    if isinstance(found, Mapping):
        found = next((found[name] for name in WRAPPERS if isinstance(found.get(name), list)), found)
    if not isinstance(found, list):
        keys = f" with the keys {', '.join(map(repr, found))}" if isinstance(found, Mapping) else ""
        raise EditError(
            f"{path}: expected a list of records, or a mapping with that list under {', '.join(WRAPPERS)}; "
            f"found a {type(found).__name__}{keys}: put the records into a list"
        )
    return found


def read_jsonl(path: Path, text: str) -> list[Any]:
    records: list[Any] = []
    # split("\n") and not splitlines(): U+2028 and its like may stand inside a JSON text
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            where = f"{path}, record {len(records) + 1} (line {number})"
            records.append(EditError(f"{where}: not JSON ({error.msg} at column {error.colno}): {REMEDY}"))
    return records


def read_csv(path: Path) -> list[Any]:
    records: list[Any] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            names = [name.strip() for name in next(rows)]
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise EditError(f"{path}: the column {doubled[0]!r} is there twice: rename one of them")
            for cells in rows:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(names):
                    where = f"{path}, record {len(records) + 1} (line {rows.line_num})"
                    problem = f"{len(cells)} cells under {len(names)} column names"
                    records.append(EditError(f"{where}: {problem} (a comma without quotes?): {REMEDY}"))
                    continue
                row = zip(names, cells, strict=True)
                records.append({name: cell for name, cell in row if cell.strip()})
        except csv.Error as error:
            raise EditError(f"{path}, line {rows.line_num}: not CSV ({error}): mend the file") from error
    return records


def decode_cells(record: Mapping[str, Any], structured: frozenset[str], where: str) -> dict[str, Any]:
    """CSV cells that stand for lists or mappings: JSON if they begin like it, else ``a|b|c``."""
    decoded = dict(record)
    for key in structured & record.keys():
        cell = record[key].strip()
        if not cell.startswith(("[", "{")):
            decoded[key] = [part.strip() for part in cell.split("|")]
            continue
        try:
            decoded[key] = json.loads(cell)
        except json.JSONDecodeError as error:
            raise EditError(
                f"{where}: field '{key}' is not JSON ({error.msg}) (expected a JSON list or mapping, or texts with | "
                f"between them): {REMEDY}"
            ) from error
    return decoded
