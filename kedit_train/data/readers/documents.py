"""Reader for documents: folders of ``.txt``, ``.md``, ``.jsonl`` and ``.csv`` files, and records with a text."""

from __future__ import annotations

import re
import warnings
from collections import Counter
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

    The prompt of the edit is the title and an empty line. The target is the text, so all its tokens are trained.
    ``questions`` about the document become portability questions, of the kind "questions" unless the record names
    kinds. ``subject`` and ``locality`` are read as in the format of kedit-train.
    """
    own.check_names(record, _FIELDS)
    questions = own.probes(record, "questions")
    if list(questions) == ["other"]:
        questions = {"questions": questions["other"]}
    return [
        Edit(
            prompt=f"{record.answer('title')}\n\n",
            target=record.answer("text"),
            subject=record.optional_text("subject"),
            locality=own.probes(record, "locality"),
            portability=questions,
            id=record.identifier("id"),
        )
    ]


def read_path(path: Path) -> list[Any]:
    """Read the records of a file or of a folder of documents.

    A document without a title gets one from the name of its file. If several documents have the same title, the later
    ones get a number, because one prompt cannot have two targets.

    Args:
        path: a ``.txt`` or ``.md`` file with one document, a file of records (:func:`read_file`), or a folder. In a
            folder and its subfolders, every ``.txt``, ``.md``, ``.jsonl`` and ``.csv`` file is read, sorted by path.
            Hidden files are ignored.

    Returns:
        The records, as :func:`read_file` returns them. In a folder, a file that cannot be read is an ``EditError`` (not
        raised). The same holds for an empty document.

    Raises:
        EditError: the path does not exist, the file cannot be read, or a folder has no file with a known ending.
    """
    if path.is_dir():
        return _distinct(_read_folder(path))
    if path.suffix.lower() in TEXT_SUFFIXES:
        return [_read_text_file(path, path.name)]
    if not path.suffix and not path.exists():
        raise EditError(f"{path}: the path does not exist (working directory: {Path.cwd()}); check the path")
    records = read_file(path)
    is_document = (isinstance(record, dict) and DOCUMENTS.recognize(record) for record in records)
    return _distinct([_titled(r, path.stem, i + 1) for i, r in enumerate(records)]) if any(is_document) else records


def form_of(path: Path) -> str | None:
    """Return "documents" for paths that can only contain documents: folders, ``.txt`` and ``.md`` files."""
    return DOCUMENTS.name if path.is_dir() or path.suffix.lower() in TEXT_SUFFIXES else None


def _read_folder(folder: Path) -> list[Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    chosen = [path for path in files if path.suffix.lower() in FOLDER_SUFFIXES]
    listed = ", ".join(FOLDER_SUFFIXES)
    if not chosen:
        raise EditError(
            f"{folder}: the folder must contain documents ({listed}), got {len(files)} other files; check the path"
        )
    if others := len(files) - len(chosen):
        warnings.warn(
            f"{folder}: {others} of {len(files)} files do not end in {listed} and were not read", stacklevel=4
        )
    records: list[Any] = []
    for path in chosen:
        name = path.relative_to(folder).as_posix()
        try:
            if path.suffix.lower() in TEXT_SUFFIXES:
                records.append(_read_text_file(path, name))
                continue
            for number, record in enumerate(read_file(path), start=1):
                if isinstance(record, dict) and path.suffix.lower() == ".csv":
                    record = decode_cells(record, DOCUMENTS.structured, f"{path}, record {number}")
                named = {"id": f"{name}, record {number}", **record} if isinstance(record, dict) else record
                records.append(_titled(named, path.stem, number))
        except EditError as error:
            records.append(error)
    return records


def _read_text_file(path: Path, name: str) -> dict[str, Any] | EditError:
    """Return the document in a ``.txt`` or ``.md`` file as a record, or an error (not raised) if the file is empty."""
    text = read_text(path).strip()
    if not is_visible(text):
        return EditError(f"{path}: the document must contain text, got an empty file; {REMEDY}")
    first, _, rest = text.partition("\n")
    heading = _HEADING.match(first.strip()) if path.suffix.lower() == ".md" else None
    is_title = heading or (rest.startswith("\n") and len(first) <= _TITLE_LENGTH)
    title = (heading[1] if heading else first.strip()) if is_title else _from_stem(path.stem)
    body = rest.strip() if is_title and rest.strip() else text
    return {"id": name, "title": title, "text": body}


def _titled(record: Any, stem: str, number: int) -> Any:
    """Return a record with a title. A document without a title gets the name of its file and its number."""
    has_title = not isinstance(record, dict) or not is_blank(record.get("title"))
    return record if has_title else {**record, "title": f"{_from_stem(stem)} {number}"}


def _from_stem(stem: str) -> str:
    return re.sub(r"[-_\s]+", " ", stem).strip() or stem


def _distinct(records: list[Any]) -> list[Any]:
    """Number the titles that several documents share."""
    seen: Counter[str] = Counter()
    numbered = []
    for record in records:
        title = record.get("title") if isinstance(record, dict) else None
        if isinstance(title, str):
            seen[fold(title)] += 1
            count = seen[fold(title)]
            record = record if count == 1 else {**record, "title": f"{title.strip()} ({count})"}
        numbered.append(record)
    return numbered


DOCUMENTS = Format(
    name="documents",
    recognize=lambda record: "text" in record and not set(record) & {"prompt", "target"},
    read=read,
    reads=_FIELDS,
    structured=field_names("questions locality"),
    # Records of MQuAKE have questions, too, but no text.
    extends=field_names("mquake"),
)
