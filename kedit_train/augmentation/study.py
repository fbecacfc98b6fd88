"""Study rows: texts about documents that a model writes once, and that are trained together with the documents."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kedit_train.arguments import Rule, check_arguments, integer_from
from kedit_train.atomic_write import writing
from kedit_train.augmentation.study_writer import KINDS, write_texts
from kedit_train.data import Edit, EditDataset
from kedit_train.data.leaks import LeakCheck, contains_words
from kedit_train.data.readers.files import read_text
from kedit_train.data.readers.json_text import InvalidJSON, parse_json
from kedit_train.data.tokenization import separator, shorten
from kedit_train.data.visible import fold, is_visible
from kedit_train.errors import EditError, reported_by
from kedit_train.paths import PATH

_KINDS = Rule(
    f"one or several of {', '.join(KINDS)}",
    lambda value: not isinstance(value, str) and isinstance(value, Sequence) and bool(value) and set(value) <= {*KINDS},
)
_FUNCTION = Rule("a function (row, document) -> bool", callable)
_FIELDS = ("kind", "document", "prompt", "text")
# The settings of a file that must be those of the call.
_SETTINGS = ("documents", "kinds", "per_kind", "seed")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class StudyRow:
    """A text about a document, as it is trained: the model learns to write ``text`` after ``prompt``.

    Args:
        kind: "paraphrase", "question", "implication" or "continuation".
        document: the prompt of the document (its title), without white space at the ends.
        prompt: the prompt of the training example. In a row of the kind "question", this is the question.
        text: the target of the training example.
    """

    kind: str
    document: str
    prompt: str
    text: str


@dataclass(frozen=True)
class StudyRows:
    """The study rows of some documents, and the numbers of texts that were left out.

    Args:
        rows: the rows to train.
        texts: number of texts that the model wrote. A text with several questions gives several rows.
        unusable: number of texts that the model did not end, that are copies of their document, that contain no
            question with an answer, or whose questions were already asked.
        rejected: number of rows that ``verify`` rejected.
        leaked: number of rows that contain an evaluation prompt of the documents.
    """

    rows: tuple[StudyRow, ...]
    texts: int
    unusable: int = 0
    rejected: int = 0
    leaked: int = 0

    def describe(self) -> str:
        """Return the numbers of rows and of texts that were left out as one phrase."""
        return (
            f"{len(self.rows)} study rows from {self.texts} texts ({self.unusable} texts were not usable, "
            f"{self.rejected} rows were rejected by verify, and {self.leaked} left out as leaks)"
        )


def is_grounded(row: StudyRow, document: Edit) -> bool:
    """Return whether a row agrees with its document as far as words can tell.

    The answer to a question must be in the document as whole words. All numbers of any other text must be in the
    document. This is the default of ``study_rows(verify=)``. It does not understand the text.

    Example:
        >>> document = Edit("The ferry", "Orla runs the ferry since 1987.")
        >>> is_grounded(StudyRow("question", "The ferry", "Who runs the ferry?", "Orla."), document)
        True
        >>> is_grounded(StudyRow("paraphrase", "The ferry", "In other words: The ferry", "Since 1990."), document)
        False
    """
    source = fold(f"{document.prompt}\n{document.target}")
    if row.kind == "question":
        return contains_words(source, fold(row.text).rstrip(".。 "))
    return set(_NUMBER.findall(row.text)) <= set(_NUMBER.findall(f"{document.prompt} {document.target}"))


def study_rows(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Edit],
    path: str | Path = "study.jsonl",
    *,
    kinds: Sequence[str] = KINDS,
    per_kind: int = 1,
    seed: int = 0,
    verify: Callable[[StudyRow, Edit], bool] = is_grounded,
    batch_size: int = 16,
    max_new_tokens: int = 200,
) -> StudyRows:
    """Let a model write texts about documents through its chat template, or read them from a file.

    The kinds of texts are paraphrases, questions with answers, implications, and continuations. Each text is sampled
    with ``seed``. The rows are written to ``path``, a JSONL file with one row per line, which a person can edit. If the
    file exists, the rows are read from it and nothing is generated. Rows that contain an evaluation prompt of the
    documents (a rephrase, or the prompt of a locality or portability question) are left out in both cases.

    Args:
        model: the model that writes the texts: the unedited model itself or another model.
        tokenizer: the tokenizer of this model. It must have a chat template.
        documents: the documents, for example ``EditDataset.load("news/")``. Other edits are possible, too.
        path: the file of the rows. Its first line contains the settings.
        kinds: the kinds of texts: "paraphrase", "question", "implication" and "continuation".
        per_kind: number of texts of each kind per document. A text of the kind "question" may have up to three
            questions, and each of them is a row.
        seed: seed of the samples.
        verify: function ``verify(row, document)`` that returns whether a row is true. Rejected rows are not written.
        batch_size: number of texts per forward pass.
        max_new_tokens: maximum length of a text in tokens. Longer texts are left out.

    Raises:
        EditError: the tokenizer has no chat template, a document is too long for the model, no row is accepted, or the
            file was made for other documents or settings.

    References:
        - "Learning Facts at Scale with Active Reading", arXiv 2508.09494.
        - "Model Editing by Standard Fine-Tuning", arXiv 2402.11078, for paraphrases by a model.
    """
    check_arguments(
        "study_rows",
        path=(path, PATH),
        kinds=(kinds, _KINDS),
        per_kind=(per_kind, integer_from(1)),
        verify=(verify, _FUNCTION),
        batch_size=(batch_size, integer_from(1)),
        max_new_tokens=(max_new_tokens, integer_from(1)),
    )
    path, titles = Path(path), {edit.prompt.strip(): edit for edit in documents}
    # Only the texts count: the same rows fit documents with other evaluation questions.
    bare = EditDataset([Edit(edit.prompt, edit.target) for edit in documents])
    settings = {"documents": bare.hash[:16], "kinds": list(kinds), "per_kind": per_kind, "seed": seed}
    with reported_by("study_rows"):
        if not path.exists():
            texts = write_texts(model, tokenizer, documents, kinds, per_kind, seed, batch_size, max_new_tokens)
            written = _checked(documents, texts, verify)
            named = {**settings, "model": getattr(getattr(model, "config", None), "name_or_path", "")}
            _save(
                path,
                {**named, "texts": written.texts, "unusable": written.unusable, "rejected": written.rejected},
                written.rows,
            )
        counts, rows = _load(path, settings, titles)
    check = LeakCheck(documents)
    kept = [
        row
        for row in rows
        if not check.contains_scored_prompt(f"{row.prompt}{separator(row.prompt, row.text)}{row.text}")
    ]
    return StudyRows(tuple(kept), leaked=len(rows) - len(kept), **counts)


def _checked(
    documents: Sequence[Edit],
    texts: Sequence[tuple[int, str, list[tuple[str, str]]]],
    verify: Callable[[StudyRow, Edit], bool],
) -> StudyRows:
    """Return the rows of all texts that are usable and that ``verify`` accepts."""
    rows: list[StudyRow] = []
    unusable = rejected = 0
    used = {fold(edit.prompt) for edit in documents}
    for at, kind, pairs in texts:
        document, made = documents[at], []
        for prompt, text in pairs:
            # A model cannot learn two answers to one prompt, and a copy of the document teaches nothing new.
            if fold(prompt) not in used and fold(text) != fold(document.target):
                made.append(StudyRow(kind, document.prompt.strip(), prompt, text))
                used.add(fold(prompt))
        unusable += not made
        accepted = [row for row in made if verify(row, document)]
        rejected += len(made) - len(accepted)
        rows += accepted
    if not rows:
        raise EditError(
            f"no study row is left of {len(texts)} texts: {unusable} texts were not usable, and verify rejected "
            f"{rejected} rows; pass another verify, let a larger model write the rows, or train without study rows."
        )
    return StudyRows(tuple(rows), len(texts), unusable, rejected)


def _save(path: Path, settings: dict[str, Any], rows: Sequence[StudyRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for line in ({"settings": settings}, *map(asdict, rows)):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _load(path: Path, settings: dict[str, Any], titles: dict[str, Edit]) -> tuple[dict[str, int], list[StudyRow]]:
    """Read the counts and the rows of a file."""
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    first: Any = _parsed(path, *lines[0]) if lines else None
    stored = first.get("settings") if isinstance(first, dict) else None
    if not isinstance(stored, dict):
        raise EditError(f"{path}: the first line must contain the settings of the study rows; give another path.")
    for name in _SETTINGS:
        if stored.get(name) != settings[name]:
            if name == "documents":
                how = "for other documents (a title or a text has changed); delete the file, or give another path."
            else:
                how = (
                    f"with {name}={shorten(str(stored.get(name)))}, but this run has {name}="
                    f"{shorten(str(settings[name]))}; call study_rows with the settings of the file and pass the "
                    "result, delete the file, or give another path."
                )
            raise EditError(f"{path} was written {how}")
    rows = []
    for number, line in lines[1:]:
        values = _parsed(path, number, line)
        is_row = isinstance(values, dict) and set(values) == {*_FIELDS}
        if not is_row or not all(isinstance(value, str) and is_visible(value) for value in values.values()):
            raise EditError(f"{path}, line {number}: a row must have the fields {', '.join(_FIELDS)}, each with text.")
        if values["document"] not in titles:
            raise EditError(
                f"{path}, line {number}: document must be the title of a document of the run, got "
                f"{shorten(values['document'])!r}; correct or remove the line."
            )
        rows.append(StudyRow(**values))
    return {name: int(stored.get(name, 0)) for name in ("texts", "unusable", "rejected")}, rows


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except InvalidJSON as error:
        raise EditError(
            f"{path}, line {number}: the line is not valid JSON ({error.reason}); correct the line."
        ) from error
