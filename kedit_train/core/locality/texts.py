"""Read the texts of a ``texts=`` argument, leave out texts with evaluation prompts, and tokenize the other texts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from kedit_train import world
from kedit_train.arguments import check_arguments, from_mapping, integer_from, optional
from kedit_train.core.locality.read_texts import read_texts
from kedit_train.core.locality.token_sequences import sequence_limit, split_sequences
from kedit_train.core.run import EditRun
from kedit_train.data.conversations import RenderedConversation, text_ids
from kedit_train.data.leaks import LeakCheck
from kedit_train.data.nearest_texts import nearest_texts
from kedit_train.data.tokenization import shorten
from kedit_train.edit import Edit
from kedit_train.errors import EditError, warn

TextSource = str | Path | Iterable[Any]
_NOT_TRAINED = "the model must not be trained on evaluation prompts"


@dataclass(frozen=True)
class Texts:
    """A source of texts, with settings for how to split the texts into token sequences.

    Every ``texts=`` argument of this package takes either a source or a ``Texts``.

    Args:
        source: a list, a ``datasets.Dataset``, the path of a file, or "world". The string "world" selects the texts for
            kedit-train's bundled model. A ``.txt`` file contains one text per line. A ``.csv`` file has a column
            ``text``. A dataset has a column ``text`` or ``messages``. A list, a ``.jsonl`` file or a ``.json`` file
            contains strings or records. A record has the key ``text`` or, for a conversation, the key ``messages``
            ([{"role": ..., "content": ...}, ...]). The chat template of the tokenizer renders conversations.
        max_length: maximum number of tokens per sequence. A longer text is split into several sequences, and no token
            is dropped.
        nearest: maximum number of texts per edit. The texts most similar to the edit are selected
            (:func:`~kedit_train.data.nearest_texts.nearest_texts`). None uses all texts.
        tokenizer: a tokenizer, or the name or path of a tokenizer. None uses the tokenizer of the run.
        seed: seed for random draws from the texts.

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
            # An iterator can be read only once, but the texts are read in prepare, in attach and in later runs.
            object.__setattr__(self, "source", list(self.source))

    @classmethod
    def of(cls, value: Any, **options: Any) -> Texts:
        """Return ``value`` if it is a ``Texts``, else create a ``Texts`` from ``value``.

        Args:
            value: a ``Texts``, a source, or a mapping with the arguments of ``Texts`` (as in YAML).
            options: default arguments of ``Texts``. They are ignored if ``value`` is a ``Texts``.

        Raises:
            EditError: the mapping has a key that is not an argument of ``Texts``.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and "source" in value:
            return from_mapping(cls, {**options, **value})
        return cls(value, **options)

    @property
    def of_world(self) -> bool:
        """Whether the source is "world", which selects the texts for kedit-train's bundled model."""
        return world.is_world(self.source)

    def check(self) -> None:
        """Read the texts once, to report an unreadable or empty source before training starts.

        Raises:
            EditError: the source cannot be read or contains no text.
        """
        if not self.of_world:
            read_texts(self.source)

    def load(
        self,
        edits: Sequence[Edit] = (),
        *,
        limit: int | None = None,
        keep_leaks: bool = False,
        tokenizer: Any = None,
        reason: str = _NOT_TRAINED,
    ) -> list[str]:
        """Return the texts, except texts that contain an evaluation prompt of ``edits``.

        The search for evaluation prompts ignores letter case and the amount of white space.

        Args:
            edits: the edits of the run. If the source is "world", texts about two kinds of facts are also left out:
                facts that the edits affect, and facts that a rephrase or a probe asks about.
            limit: maximum number of texts, drawn at random with ``seed``. None returns all texts.
            keep_leaks: True keeps texts that contain an evaluation prompt. Use True only if the model is not trained on
                the texts.
            tokenizer: renders conversations. None uses the tokenizer of this ``Texts``.
            reason: why texts with evaluation prompts are excluded, for the warning.

        Raises:
            EditError: the source cannot be read, no text is left, or the texts contain conversations and there is no
                tokenizer with a chat template.
        """
        if self.of_world:
            # The most similar texts are selected from all texts.
            texts = world.locality_texts(edits) if self.nearest is None else world.locality_texts(edits, n=None)
        else:
            texts = read_texts(self.source, self.tokenizer if tokenizer is None else tokenizer, render=True)
        if not keep_leaks:
            # The user has not written the bundled texts and cannot correct them, so a warning about leaks would not
            # help.
            texts = _without_leaks(texts, edits, reason, quiet=self.of_world)
        if self.nearest is not None:
            texts = nearest_texts(texts, edits, self.nearest)
            if not texts:
                raise EditError(
                    "every text contains the subject and the old answer of an edit, and nearest= excludes such texts; "
                    "pass other texts, or remove nearest=."
                )
        if limit is not None and limit < len(texts):
            texts = random.Random(self.seed).sample(texts, limit)
        return texts

    def tokenize(
        self,
        run: EditRun,
        *,
        edits: Sequence[Edit] | None = None,
        limit: int | None = None,
        reason: str = _NOT_TRAINED,
    ) -> list[list[int]]:
        """Load the texts and split them into sequences of at most ``max_length`` token ids.

        Args:
            run: the run. Its tokenizer is used if this ``Texts`` has none. No sequence is longer than the context
                length of its model.
            edits: texts that contain an evaluation prompt of these edits are left out. None uses ``run.edits``.
            limit: maximum number of texts, drawn at random with ``seed``. None uses all texts.
            reason: why texts with evaluation prompts are left out, for the warning.

        Returns:
            One list of token ids per sequence.

        Raises:
            EditError: the source cannot be read, no text is left, or the tokenizer returns no token.
        """
        tokenizer = run.tokenizer(self.tokenizer)
        edits = run.edits if edits is None else edits
        texts = self.load(edits, limit=limit, tokenizer=tokenizer, reason=reason)
        run.host.show_progress(f"reading {len(texts)} texts")
        sequences = split_sequences(text_ids(tokenizer, texts), sequence_limit(run, self.max_length))
        if not sequences:
            raise EditError(f"the tokenizer returns no token for any of the {len(texts)} texts; pass other texts.")
        return sequences


def _without_leaks(texts: Sequence[str], edits: Iterable[Edit], reason: str, *, quiet: bool) -> list[str]:
    check = LeakCheck(edits)
    leaks = [check.contains_prompt(text) or _contents_leak(text, check) for text in texts]
    kept = [text for text, leak in zip(texts, leaks, strict=True) if not leak]
    if len(kept) < len(texts) and not quiet:
        warn(
            f"{len(texts) - len(kept)} of {len(texts)} texts contain an evaluation prompt of the edits (the first: "
            f"{shorten(texts[leaks.index(True)])!r}). These texts are left out, because {reason}."
        )
    if not kept:
        raise EditError("every text contains an evaluation prompt of the edits, so no text is left; pass other texts.")
    return kept


def _contents_leak(text: str, check: LeakCheck) -> bool:
    """Return whether the original messages of a conversation contain an evaluation prompt.

    The chat template may change the messages, so the prompt may be missing from the rendered ``text``.
    """
    return isinstance(text, RenderedConversation) and check.contains_prompt(text.contents)
