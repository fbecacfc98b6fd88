"""Study rows: texts about documents. A model writes them once, and they are trained together with the documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kedit_train.arguments import Rule, check_arguments, integer_from, optional
from kedit_train.augmentation.study_file import load_rows, save_rows, whole_documents
from kedit_train.augmentation.study_writer import KINDS, write_texts
from kedit_train.data import Edit
from kedit_train.data.leaks import LeakCheck, contains_words
from kedit_train.data.tokenization import separator, shorten
from kedit_train.data.visible import fold
from kedit_train.errors import EditError, reported_by, warn
from kedit_train.paths import PATH

_KINDS = Rule(
    f'a list (such as ["question"]) of one or more of {", ".join(KINDS)}',
    lambda value: not isinstance(value, str) and isinstance(value, Sequence) and bool(value) and set(value) <= {*KINDS},
)
_FUNCTION = Rule("a function (row, document) -> bool", callable)
# The numbers of texts and rows that a file stores together with the settings.
_COUNTS = ("texts", "unusable", "rejected")
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
        unusable: number of texts that gave no row: texts that the model did not end, copies of a document, and texts of
            the kind "question" without a new question and its answer.
        rejected: number of rows that ``verify`` rejected.
        leaked: number of rows that contain an evaluation prompt of the documents.
    """

    rows: tuple[StudyRow, ...]
    texts: int
    unusable: int = 0
    rejected: int = 0
    leaked: int = 0

    def describe(self) -> str:
        """Return one phrase: the number of rows, and how many texts and rows were left out."""
        return (
            f"{len(self.rows)} study rows from {self.texts} texts ({self.unusable} texts were not usable, "
            f"{self.rejected} rows were rejected by verify, and {self.leaked} rows contained an evaluation prompt)"
        )


def is_grounded(row: StudyRow, document: Edit) -> bool:
    """Return whether a row agrees with its document, according to simple rules.

    The answer to a question must have a letter or a digit, and must be in the document as whole words. For a row of any
    other kind, all numbers in its text must be in the document. These rules do not find every false text. With
    ``verify=None``, :func:`study_rows` calls this function for new rows.

    Example:
        >>> document = Edit("The ferry", "Orla runs the ferry since 1987.")
        >>> is_grounded(StudyRow("question", "The ferry", "Who runs the ferry?", "Orla."), document)
        True
        >>> is_grounded(StudyRow("paraphrase", "The ferry", "In other words: The ferry", "Since 1990."), document)
        False
    """
    source = fold(f"{document.prompt}\n{document.target}")
    if row.kind == "question":
        answer = fold(row.text).rstrip(".。 ")
        return any(map(str.isalnum, answer)) and contains_words(source, answer)
    return set(_NUMBER.findall(row.text)) <= set(_NUMBER.findall(f"{document.prompt} {document.target}"))


def study_rows(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Edit],
    path: str | Path = "study.jsonl",
    *,
    kinds: Sequence[str] | None = None,
    per_kind: int | None = None,
    seed: int | None = None,
    verify: Callable[[StudyRow, Edit], bool] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 200,
) -> StudyRows:
    """Write texts about documents with a model and its chat template, or read such texts from a file.

    If the file ``path`` does not exist, the model writes paraphrases, questions with answers, implications and
    continuations. Each text is sampled with ``seed``. The rows are saved in ``path``, a JSONL file with one row per
    line, which a person can edit.

    If the file exists, the rows are read from it and nothing is generated. If ``kinds``, ``per_kind`` or ``seed``
    differs from its value in the file, the argument has no effect and a warning is given.

    You may split the documents with ``split_documents`` before or after the file is written. Rows that contain an
    evaluation prompt of the documents are never returned. An evaluation prompt is a rephrase, or the prompt of a
    locality or portability question.

    Args:
        model: the model that writes the texts: the unedited model itself or another model.
        tokenizer: the tokenizer of this model. It must have a chat template.
        documents: the documents, for example ``EditDataset.load("news/")``. Other edits are possible, too.
        path: the file of the rows. Its first line contains the settings.
        kinds: the kinds of texts to write. None writes all kinds: "paraphrase", "question", "implication" and
            "continuation".
        per_kind: number of texts of each kind per document. None writes one. A text of the kind "question" may have up
            to three questions, and each of them is a row.
        seed: seed of the samples. None uses 0.
        verify: function ``verify(row, document)`` that returns whether a row is true. Rejected rows are not returned
            and not written to a new file. An existing file is not changed. With None, :func:`is_grounded` checks new
            rows, and all rows of an existing file are accepted.
        batch_size: number of texts per forward pass.
        max_new_tokens: maximum length of a text in tokens. Longer texts are left out.

    Raises:
        EditError: the tokenizer has no chat template, a document is too long for the model, no row is left, or the file
            was written for other documents or other texts.

    References:
        - "Learning Facts at Scale with Active Reading", arXiv 2508.09494.
        - "Model Editing by Standard Fine-Tuning", arXiv 2402.11078, for paraphrases by a model.
    """
    check_arguments(
        "study_rows",
        path=(path, PATH),
        kinds=(kinds, optional(_KINDS)),
        per_kind=(per_kind, optional(integer_from(1))),
        verify=(verify, optional(_FUNCTION)),
        batch_size=(batch_size, integer_from(1)),
        max_new_tokens=(max_new_tokens, integer_from(1)),
    )
    path = Path(path)
    chosen = {"kinds": kinds and list(kinds), "per_kind": per_kind, "seed": seed}
    given = {name: value for name, value in chosen.items() if value is not None}
    with reported_by("study_rows"):
        is_new = not path.exists()
        if is_new:
            settings: dict[str, Any] = {"kinds": list(KINDS), "per_kind": 1, "seed": 0, **given}
            sampled = (settings["kinds"], settings["per_kind"], settings["seed"])
            texts = write_texts(model, tokenizer, documents, *sampled, batch_size, max_new_tokens)
            written = _checked(documents, texts, verify or is_grounded)
            settings["model"] = getattr(getattr(model, "config", None), "name_or_path", "")
            settings |= {name: getattr(written, name) for name in _COUNTS}
            save_rows(path, documents, settings, [asdict(row) for row in written.rows])
        stored, values = load_rows(path, documents)
        _warn_if_different(path, stored, given)
        rows = accepted = [StudyRow(**value) for value in values]
        # New rows were verified before they were written.
        if verify is not None and not is_new:
            whole = whole_documents(documents)
            accepted = [row for row in rows if verify(row, whole[row.document])]
        check = LeakCheck(documents)
        kept = [
            row
            for row in accepted
            if not check.contains_scored_prompt(f"{row.prompt}{separator(row.prompt, row.text)}{row.text}")
        ]
        rejected, leaked = len(rows) - len(accepted), len(accepted) - len(kept)
        if not kept:
            raise EditError(
                f"{path} has no study row that can be trained: verify rejected {rejected} rows, and {leaked} rows "
                "contain an evaluation prompt; add rows to the file, or give another path."
            )
    counts = {name: int(stored.get(name, 0)) for name in _COUNTS}
    counts["rejected"] += rejected
    return StudyRows(tuple(kept), leaked=leaked, **counts)


def _warn_if_different(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Warn if the settings in the file differ from the settings of the call."""
    names = [name for name, value in given.items() if stored.get(name) != value]
    if names:
        own, others = (
            ", ".join(f"{name}={shorten(str(values.get(name)))}" for name in names) for values in (stored, given)
        )
        warn(
            f"{path} was written with {own}. The rows of this file are used, so the arguments {others} have no effect; "
            "to write new rows, give another path."
        )


def _checked(
    documents: Sequence[Edit],
    texts: Sequence[tuple[int, str, list[tuple[str, str]]]],
    verify: Callable[[StudyRow, Edit], bool],
) -> StudyRows:
    """Make rows from the usable texts, and return the rows that ``verify`` accepts."""
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
            f"no study row is left: {unusable} of the {len(texts)} generated texts gave no usable row, and verify "
            f"rejected the {rejected} rows of the others; pass another verify, let a larger model write the rows, or "
            "train without study rows."
        )
    return StudyRows(tuple(rows), len(texts), unusable, rejected)
