"""Write study rows to a JSONL file, and read them for the documents of a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.data import Edit
from kedit_train.data.readers.fields import quoted
from kedit_train.data.readers.files import read_text
from kedit_train.data.readers.json_text import InvalidJSON, parse_json
from kedit_train.data.tokenization import shorten
from kedit_train.data.visible import is_visible
from kedit_train.errors import EditError

FIELDS = ("kind", "document", "prompt", "text")
# ``split_documents`` adds this ending to the title of a part.
_PART = re.compile(r" \(part \d+\)$")


def save_rows(
    path: Path, documents: Sequence[Edit], settings: Mapping[str, Any], rows: Sequence[Mapping[str, str]]
) -> None:
    """Write the rows to a JSONL file, one per line. The first line has the settings and one hash per document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = {"settings": {"documents": _hashes(documents), **settings}}
    with writing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for line in (first, *rows):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def load_rows(path: Path, documents: Sequence[Edit]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Read the settings and the rows of a file. The documents may have been split since the file was written.

    Raises:
        EditError: the file is malformed, a row is about a document that is not in ``documents``, or the text of a
            document has changed.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    first: Any = _parsed(path, *lines[0]) if lines else None
    settings = first.get("settings") if isinstance(first, dict) else None
    if not isinstance(settings, dict):
        raise EditError(f"{path}: the first line must contain the settings of the study rows; give another path.")
    known = settings.get("documents")
    for title, found in _hashes(documents).items():
        if isinstance(known, dict) and known.get(title, found) != found:
            raise EditError(
                f"{path} was written for another version of the document {shorten(title)!r}; pass that version, or "
                "give another path."
            )
    titles = {document.prompt.strip() for document in documents}
    return settings, [_row(path, number, line, titles) for number, line in lines[1:]]


def title_in(title: str, titles: Collection[str]) -> str | None:
    """Look up the title of a document in ``titles``. Return the title that was found, or None.

    If ``title`` names a part, such as "News (part 2)", and ``titles`` does not contain this part, the title of the
    whole document ("News") is looked up instead.

    Example:
        >>> title_in("News (part 2)", {"News"}), title_in("News (part 2)", {"News", "News (part 2)"})
        ('News', 'News (part 2)')
    """
    return next((name for name in (title, _PART.sub("", title)) if name in titles), None)


def whole_documents(documents: Sequence[Edit]) -> dict[str, Edit]:
    """Return a dict from title to document. If a document was split, its first part gets the text of all parts.

    Example:
        >>> parts = [Edit("News", "Ada is well."), Edit("News (part 2)", "Ben is well.")]
        >>> whole_documents(parts)["News"].target
        'Ada is well. Ben is well.'
    """
    by_title = {document.prompt.strip(): document for document in documents}
    for title, document in list(by_title.items()):
        whole = _PART.sub("", title)
        if whole != title and whole in by_title:
            by_title[whole] = replace(by_title[whole], target=f"{by_title[whole].target} {document.target}")
    return by_title


def _hashes(documents: Sequence[Edit]) -> dict[str, str]:
    """Return one hash per title. It ignores white space, so a document has the same hash before and after a split."""
    texts: dict[str, str] = defaultdict(str)
    for document in documents:
        texts[_PART.sub("", document.prompt.strip())] += "".join(document.target.split())
    return {title: hashlib.sha256(text.encode()).hexdigest()[:16] for title, text in texts.items()}


def _row(path: Path, number: int, line: str, titles: Collection[str]) -> dict[str, str]:
    row = _parsed(path, number, line)
    has_fields = isinstance(row, dict) and set(row) == {*FIELDS}
    if not has_fields or not all(isinstance(value, str) and is_visible(value) for value in row.values()):
        raise EditError(
            f"{path}, line {number}: a row must have exactly the fields {quoted(FIELDS)}, each with text that is "
            "not blank; correct the row."
        )
    title = title_in(row["document"], titles)
    if title is None:
        raise EditError(
            f'{path}, line {number}: the field "document" must be the title of a document of the run, got '
            f"{shorten(row['document'])!r}; correct the title, or pass all documents of the file."
        )
    return {**row, "document": title}


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except InvalidJSON as error:
        raise EditError(
            f"{path}, line {number}: the line is not valid JSON ({error.reason}); correct the line."
        ) from error
