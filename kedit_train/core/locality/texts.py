"""Texts of a ``texts=`` argument: where they come from, what is left out, and how they are split into sequences."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from kedit_train import world
from kedit_train.arguments import check_arguments, from_mapping, integer_from, optional
from kedit_train.core.locality.token_sequences import sequence_limit, split_sequences
from kedit_train.core.run import EditRun
from kedit_train.data.leaks import LeakCheck
from kedit_train.data.nearest_texts import nearest_texts
from kedit_train.edit import Edit
from kedit_train.errors import EditError, warn

TextSource = str | Path | Iterable[Any]

# Number of texts that are drawn from the embedded world.
WORLD_LIMIT = 1024


@dataclass(frozen=True)
class Texts:
    """Texts, where they come from and how they are cut into sequences of tokens.

    Every ``texts=`` argument of this package takes either a source or a ``Texts``.

    Args:
        source: a list of strings; a path to ``.txt`` (one text a line), ``.jsonl`` or ``.json`` (strings, or records
            with ``text``); a ``datasets.Dataset`` with a column ``text``; or "world", facts of the embedded world.
        max_length: tokens per sequence. A longer text is split into several sequences; no token is dropped.
        nearest: use at most this many texts per edit, those nearest to it
            (:func:`~kedit_train.data.nearest_texts.nearest_texts`). None uses all texts.
        tokenizer: a tokenizer, or a name or path to load one from. None uses the tokenizer of the run.
        seed: seed for everything that is drawn from the texts.

    Example:
        >>> texts = Texts(["The sky is blue.", "Grass is green."], max_length=64)
        >>> texts.load()
        ['The sky is blue.', 'Grass is green.']
    """

    source: TextSource
    _: KW_ONLY
    max_length: int = 256
    nearest: int | None = None
    tokenizer: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(
            self,
            max_length=(self.max_length, integer_from(1)),
            nearest=(self.nearest, optional(integer_from(1))),
        )
        if isinstance(self.source, Iterator):
            # The texts are read several times: by prepare, by attach and in later runs.
            object.__setattr__(self, "source", list(self.source))

    @classmethod
    def of(cls, value: Any, **options: Any) -> Texts:
        """Return ``value`` if it is a ``Texts``, else a ``Texts`` of that source.

        Args:
            value: a ``Texts``, a source, or a mapping with the arguments of ``Texts`` (as in YAML).
            options: arguments of ``Texts`` to use with a source.

        Raises:
            EditError: the mapping has a key that ``Texts`` does not know.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and "source" in value:
            return from_mapping(cls, {**options, **value})
        return cls(value, **options)

    @property
    def of_world(self) -> bool:
        """Whether the source is the embedded world."""
        return world.is_world(self.source)

    def check(self) -> None:
        """Read the texts once, to report an unreadable or empty source before training starts.

        Raises:
            EditError: the source cannot be read or holds no text.
        """
        if not self.of_world:
            _read_texts(self.source)

    def load(self, edits: Sequence[Edit] = (), *, limit: int | None = None, keep_leaks: bool = False) -> list[str]:
        """Return the texts without those that contain a prompt that ``edits`` are scored on.

        Letter case and the amount of white space are ignored.

        Args:
            edits: the edits of the run. With "world", facts that depend on them are left out as well.
            limit: at most this many texts, drawn with ``seed``. None returns all.
            keep_leaks: keep texts that contain a scored prompt. Only for texts that are not trained on.

        Raises:
            EditError: the source cannot be read, or no text is left.
        """
        if self.of_world:
            texts = world.locality_texts(exclude=edits, n=WORLD_LIMIT if self.nearest is None else None)
        else:
            texts = _read_texts(self.source)
        if not keep_leaks:
            texts = _without_leaks(texts, edits)
        if self.nearest is not None:
            texts = nearest_texts(texts, edits, self.nearest)
            if not texts:
                raise EditError(
                    "every text states what an edit changes (its subject with its old answer), so no text can stay; "
                    "give other texts"
                )
        if limit is not None and limit < len(texts):
            texts = random.Random(self.seed).sample(texts, limit)
        return texts

    def tokenize(
        self, run: EditRun, *, edits: Sequence[Edit] | None = None, limit: int | None = None
    ) -> list[list[int]]:
        """Load the texts and cut them into sequences of at most ``max_length`` token ids.

        Args:
            run: supplies the edits, the tokenizer and the context length of the model.
            edits: the edits whose prompts must not be in a text. None uses ``run.edits``.
            limit: at most this many texts, drawn with ``seed``. None uses all.

        Returns:
            One list of token ids per sequence.

        Raises:
            EditError: as :meth:`load`, or the tokenizer returns no token.
        """
        texts = self.load(run.edits if edits is None else edits, limit=limit)
        tokenizer = run.tokenizer(self.tokenizer)
        ids = tokenizer(texts, truncation=False)["input_ids"]
        sequences = split_sequences(ids, sequence_limit(run, self.max_length))
        if not sequences:
            raise EditError(f"the tokenizer returns no token for any of the {len(texts)} texts; give other texts")
        return sequences


def _read_texts(source: Any) -> list[str]:
    name = "texts"
    if isinstance(source, str | Path):
        name, source = str(source), _read_file(Path(source))
    if getattr(source, "column_names", None) is not None and "text" not in source.column_names:
        raise EditError(
            f'the dataset must have a column "text", got the columns {", ".join(source.column_names)}; rename one.'
        )
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise EditError(f"texts must be a list of strings, a path or a dataset, got {source!r}.")
    texts = []
    for number, record in enumerate(source, 1):
        text = record.get("text") if isinstance(record, Mapping) else record
        if not isinstance(text, str):
            raise EditError(f'{name}, record {number}: expected a string or a record with "text", got {record!r}.')
        texts.append(text)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise EditError(f"{name} contains no text; give texts on which the model should stay as it is.")
    return texts


def _read_file(path: Path) -> list[Any]:
    try:
        if not path.is_file():
            raise FileNotFoundError
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EditError(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise EditError(
            f"there is no file {str(path)!r}; give a path to .txt, .jsonl or .json, or a list of texts."
        ) from error
    if path.suffix == ".json":
        records = _parse_json(content, str(path))
        return records if isinstance(records, list) else [records]
    # splitlines() would also split at separators inside a text, such as U+2028.
    lines = content.split("\n")
    if path.suffix == ".jsonl":
        return [_parse_json(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    return lines


def _parse_json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise EditError(f"{where} cannot be read: {error}") from error


def _without_leaks(texts: Sequence[str], edits: Iterable[Edit]) -> list[str]:
    check = LeakCheck(edits)
    kept = [text for text in texts if not check.contains_prompt(text)]
    if len(kept) < len(texts):
        warn(
            f"{len(texts) - len(kept)} of {len(texts)} texts contain a prompt that the edits are scored on. They are "
            "left out, so that nothing is trained on that the edit is scored on."
        )
    if not kept:
        raise EditError("every text contains a prompt that the edits are scored on; give other texts.")
    return kept
