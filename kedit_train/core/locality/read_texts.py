"""Read texts and conversations from a file, a list or a dataset."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kedit_train.arguments import cut
from kedit_train.data.conversations import check_messages, render_conversation
from kedit_train.data.readers.fields import REMEDY, quoted
from kedit_train.data.readers.files import read_csv
from kedit_train.data.readers.json_text import InvalidJSON, parse_json
from kedit_train.data.visible import is_visible
from kedit_train.errors import EditError


def read_texts(source: Any, tokenizer: Any = None, *, render: bool = False) -> list[str]:
    """Return the texts of a source. Texts without visible characters are left out.

    Args:
        source: a list, a path or a dataset, as for :class:`~kedit_train.core.locality.texts.Texts`.
        tokenizer: a tokenizer with a chat template. Required if ``render`` is True and there are conversations.
        render: True renders conversations with the chat template. False returns the contents of their messages.

    Raises:
        EditError: the source cannot be read, a record is malformed, there is no text, or a conversation cannot be
            rendered.
    """
    name = "texts"
    if isinstance(source, str | Path):
        name, source = str(source), _read_file(Path(source))
    columns = getattr(source, "column_names", None)
    if columns is not None and not {"text", "messages"} & set(columns):
        raise EditError(
            f'the dataset must have a column "text" or "messages", got the columns {", ".join(columns)}; '
            'rename one column to "text".'
        )
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise EditError(
            f"texts must be a list of strings, a path or a dataset, got {reprlib.repr(source)}; give texts on which "
            "predictions should stay the same."
        )
    texts = []
    for number, record in enumerate(source, 1):
        where = f"{name}, record {number}"
        if isinstance(record, Mapping) and record.get("messages") is not None:
            check_messages(record["messages"], where)
            for message in record["messages"]:
                _check_unicode(message["content"], where)
            # The chat template may add visible text to an empty conversation, so the messages themselves are checked.
            if any(is_visible(message["content"]) for message in record["messages"]):
                texts.append(_conversation(record["messages"], tokenizer, where, render))
            continue
        text = record.get("text") if isinstance(record, Mapping) else record
        if not isinstance(text, str):
            raise EditError(
                f'{where}: expected a string, or a record with a string "text" or a list "messages", got '
                f"{reprlib.repr(record)}; correct this record."
            )
        _check_unicode(text, where)
        texts.append(text)
    texts = [text for text in texts if is_visible(text)]
    if not texts:
        raise EditError(f"{name} contains no text; pass texts on which the model should not change.")
    return texts


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EditError(
            f"{where} must be valid Unicode, got a lone surrogate at character {error.start}; correct this record."
        ) from error


def _conversation(messages: Any, tokenizer: Any, where: str, render: bool) -> str:
    if not render:
        return "\n".join(message["content"] for message in messages)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        raise EditError(f"{where} is a conversation and needs a tokenizer; pass Texts(..., tokenizer=tokenizer).")
    return render_conversation(tokenizer, messages, where)


def _read_file(path: Path) -> list[Any]:
    try:
        if not path.is_file():
            raise FileNotFoundError
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EditError(f"{path} must be a UTF-8 text file: {error}; save the file as UTF-8.") from error
    except OSError as error:
        raise EditError(
            f"file {str(path)!r} does not exist or cannot be read; pass the path of a .txt, .jsonl, .json or .csv "
            "file, or a list of texts."
        ) from error
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _csv_texts(path) if content.strip() else []
    if suffix == ".json":
        records = _parse_json(content, str(path))
        return records if isinstance(records, list) else [records]
    # splitlines() would also split at separators inside a text, such as U+2028.
    lines = content.split("\n")
    if suffix == ".jsonl":
        return [
            _parse_json(line, f"{path}, line {n}", one_line=True) for n, line in enumerate(lines, 1) if line.strip()
        ]
    return lines


def _csv_texts(path: Path) -> list[str]:
    """Return the column "text" of a CSV file."""
    records = read_csv(path)
    for record in records:
        if isinstance(record, EditError):
            raise EditError(f"{str(record).removesuffix(REMEDY)}correct this row.")
    # A row has no key for an empty cell.
    columns = dict.fromkeys(name for record in records for name in record)
    if records and "text" not in columns:
        raise EditError(
            f'{path} must have a column "text", got the columns {cut(quoted(columns))}; rename one column to "text". '
            "If the file contains one text per line, change the ending of the file name to .txt instead."
        )
    return [record.get("text", "") for record in records]


def _parse_json(content: str, where: str, *, one_line: bool = False) -> Any:
    try:
        return parse_json(content)
    except InvalidJSON as error:
        line = "" if one_line else f"line {error.line}, "
        place = "" if error.line is None else f" at {line}column {error.column}"
        raise EditError(f"{where} must be valid JSON: {error.reason}{place}; correct the file.") from error
