"""Reader for documents: folders of ``.txt``, ``.md``, ``.jsonl`` and ``.csv`` files, and records with a text."""

from __future__ import annotations

import re
import warnings
from itertools import count
from pathlib import Path
from typing import Any

from kedit_train.data.readers import own
from kedit_train.data.readers.fields import REMEDY, Fields, is_blank
from kedit_train.data.readers.files import decode_cells, read_file, read_text
from kedit_train.data.readers.format import Format, field_names
from kedit_train.data.visible import fold, is_visible
from kedit_train.edit import Edit
from kedit_train.errors import EditError

TEXT_SUFFIXES = (".txt", ".md")
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".csv")
# A longer first line is part of the text and not a title.
_TITLE_LENGTH = 120
_HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*$")
_FIELDS = field_names("id title text subject questions locality")


def read(record: Fields) -> list[Edit]:
    """Read a document: the model is trained to write ``text`` after ``title``.

    The prompt of the edit is the title and an empty line. The target is the whole text.

    ``questions`` contains questions about the document. It is a list of questions, or a mapping from kinds to such
    lists. The questions become portability questions. If ``questions`` is a list, their kind is "questions".
    ``subject`` and ``locality`` have the same form as in the format "edits", the format of kedit-train.
    """
    # Every document has the field "text". This field is read first, so that the error for a record of another format
    # names this field.
    text = record.answer("text")
    questions = own.probes(record, "questions")
    if list(questions) == ["other"]:
        questions = {"questions": questions["other"]}
    return [
        Edit(
            prompt=f"{record.answer('title')}\n\n",
            target=text,
            subject=record.optional_text("subject"),
            locality=own.probes(record, "locality"),
            portability=questions,
            id=record.identifier("id"),
        )
    ]


def read_path(path: Path) -> tuple[list[Any], list[str]]:
    """Read the records of a file or of a folder of documents.

    If a document has no title, its title is made from the name of its file. If several documents have the same title, a
    number is added to the titles of the later documents, because one prompt cannot have two targets.

    Args:
        path: a ``.txt`` or ``.md`` file with one document, a file of records (:func:`read_file`), or a folder. In a
            folder and its subfolders, every ``.txt``, ``.md``, ``.jsonl`` and ``.csv`` file is read, sorted by path.
            Hidden files are ignored.

    Returns:
        Two lists of the same length. The first list contains the records, as :func:`read_file` returns them. For each
        empty document and for each unreadable file in a folder, it contains an ``EditError`` (not raised) instead of a
        record. The second list says where each record comes from: a path, and for a file of records also the number of
        the record. Error messages about the record begin with this text.

    Raises:
        EditError: the path does not exist, the file cannot be read, or a folder has no file with a known ending.
    """
    if path.is_dir():
        records, places = _read_folder(path)
        return _distinct(records), places
    if path.suffix.lower() in TEXT_SUFFIXES:
        return [_read_text_file(path, path.name)], [str(path)]
    if not path.suffix and not path.exists():
        raise EditError(f"{path}: the path does not exist (working directory: {Path.cwd()}); check the path")
    records = read_file(path)
    titled = [_titled(record, path.stem, number) for number, record in enumerate(records, start=1)]
    return _distinct(titled), [f"{path}, record {number}" for number in range(1, len(records) + 1)]


def form_of(path: Path) -> str | None:
    """Return "documents" for a folder and for a ``.txt`` or ``.md`` file, and None for any other path."""
    return DOCUMENTS.name if path.is_dir() or path.suffix.lower() in TEXT_SUFFIXES else None


def _read_folder(folder: Path) -> tuple[list[Any], list[str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    chosen = [path for path in files if path.suffix.lower() in FOLDER_SUFFIXES]
    listed = ", ".join(FOLDER_SUFFIXES)
    if not chosen:
        raise EditError(
            f"{folder}: the folder must contain documents ({listed}), got "
            f"{f'only other files ({len(files)})' if files else 'no files'}; check the path"
        )
    if others := len(files) - len(chosen):
        warnings.warn(
            f"{folder}: {others} of {len(files)} files do not end in {listed} and were not read", stacklevel=4
        )
    records: list[Any] = []
    places: list[str] = []
    for path in chosen:
        name = path.relative_to(folder).as_posix()
        is_text = path.suffix.lower() in TEXT_SUFFIXES
        try:
            read = [_read_text_file(path, name)] if is_text else _read_records(path, name)
        except EditError as error:
            read = [error]
        records += read
        places += [str(path)] if is_text else [f"{path}, record {number}" for number in range(1, len(read) + 1)]
    return records, places


def _read_records(path: Path, name: str) -> list[Any]:
    """Read a file of records in a folder. A record without an identifier gets one, such as "news.jsonl, record 3"."""
    records: list[Any] = []
    for number, record in enumerate(read_file(path), start=1):
        if isinstance(record, dict):
            try:
                if path.suffix.lower() == ".csv":
                    record = decode_cells(record, DOCUMENTS.structured, f"{path}, record {number}")
                record = _titled({"id": f"{name}, record {number}", **record}, path.stem, number)
            except EditError as error:
                record = error
        records.append(record)
    return records


def _read_text_file(path: Path, name: str) -> dict[str, Any] | EditError:
    """Return the document in a ``.txt`` or ``.md`` file as a record.

    If the file is empty or has only a heading, an ``EditError`` is returned instead (not raised).
    """
    text = read_text(path).strip()
    if not is_visible(text):
        return EditError(f"{path}: the document must contain text, got an empty file; {REMEDY}")
    first, _, rest = text.partition("\n")
    heading = _HEADING.match(first.strip()) if path.suffix.lower() == ".md" else None
    if heading and not is_visible(rest):
        return EditError(f"{path}: the document must contain text, got only a heading; {REMEDY}")
    second, line_end, _ = rest.partition("\n")
    is_title = heading or (line_end and not second.strip() and len(first) <= _TITLE_LENGTH)
    title = (heading[1] if heading else first.strip()) if is_title else _from_stem(path.stem)
    return {"id": name, "title": title, "text": rest.strip() if is_title else text}


def _titled(record: Any, stem: str, number: int) -> Any:
    """Add a title to a document without one: the name of its file and its number, such as "news 3"."""
    if not _is_document(record) or not is_blank(record.get("title")):
        return record
    return {**record, "title": f"{_from_stem(stem)} {number}"}


def _is_document(record: Any) -> bool:
    return isinstance(record, dict) and DOCUMENTS.recognize(record)


def _from_stem(stem: str) -> str:
    return re.sub(r"[-_\s]+", " ", stem).strip() or stem


def _distinct(records: list[Any]) -> list[Any]:
    """Add a number to each title that an earlier document already has."""
    titles = [record["title"] if _is_document(record) else None for record in records]
    taken = {fold(title) for title in titles if isinstance(title, str)}
    numbers: dict[str, int] = {}
    numbered = []
    for record, title in zip(records, titles, strict=True):
        if isinstance(title, str):
            key, title = fold(title), title.strip()
            number = numbers.get(key, 0) + 1
            if number > 1:
                number = next(n for n in count(number) if fold(f"{title} ({n})") not in taken)
                record = {**record, "title": f"{title} ({number})"}
            numbers[key] = number
        numbered.append(record)
    return numbered


DOCUMENTS = Format(
    name="documents",
    recognize=lambda record: "text" in record and not set(record) & {"prompt", "target"},
    read=read,
    reads=_FIELDS,
    structured=field_names("questions locality"),
    # A document with questions is also recognized as a record of MQuAKE.
    extends=field_names("mquake"),
)
