"""The texts whose predictions an edit is most likely to change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from heapq import nsmallest
from typing import Any

from kedit_train.data.leaks import contains_words, fold
from kedit_train.data.tokenization import SPACELESS
from kedit_train.edit import Edit

WORD = re.compile(r"\w+")


def nearest_texts(texts: Sequence[str], edits: Sequence[Edit], n: int) -> list[str]:
    """Return the ``n`` nearest texts of each edit, each text once, in the order of ``texts``.

    A text is nearer if it contains the old answer of the edit as whole words, and among equals if it shares more words
    with the prompt, without the subject. A single edit mostly changes the answers about other subjects that had the
    same old answer, in a similar wording (the neighborhood prompts of CounterFact). A text that contains the subject of
    an edit and its old answer states what that edit changes, and is never returned. Letter case makes no difference.
    Scripts without spaces are compared by pairs of characters. Among equals, the earlier text is nearer.

    Args:
        texts: the texts.
        edits: the edits.
        n: texts per edit.

    References:
        "Locating and Editing Factual Associations in GPT", arXiv 2202.05262 (CounterFact).

    Example:
        >>> edit = Edit("Ann was born in", "Oslo", subject="Ann", old_target="Rome")
        >>> nearest_texts(["Water is wet", "Bo was born in Rome", "Ann was born in Rome"], [edit], n=1)
        ['Bo was born in Rome']
    """
    facts = [(fold(edit.subject or ""), fold(edit.old_target or "").rstrip(".")) for edit in edits]
    candidates: list[tuple[str, str, frozenset[str]]] = []
    for text in dict.fromkeys(texts):
        normalized = fold(text)
        if not any(
            subject and old and contains_words(normalized, subject) and contains_words(normalized, old)
            for subject, old in facts
        ):
            candidates.append((text, normalized, _words(normalized)))
    chosen: set[str] = set()
    for edit, (subject, old) in zip(edits, facts, strict=True):
        prompt = fold(edit.prompt)
        prompt_words = _words(prompt.replace(subject, " ") if subject else prompt)

        def rank(
            candidate: tuple[str, str, frozenset[str]], old: str = old, words: frozenset[str] = prompt_words
        ) -> Any:
            return not (old and contains_words(candidate[1], old)), -len(words & candidate[2])

        chosen.update(text for text, *_ in nsmallest(n, candidates, key=rank))
    return [text for text, *_ in candidates if text in chosen]


def _words(text: str) -> frozenset[str]:
    """Return the words of a text, and the pairs of characters of words without spaces between them."""
    parts: list[str] = []
    for word in WORD.findall(text):
        pairs = [word[i : i + 2] for i in range(len(word) - 1)] if SPACELESS.search(word) else []
        parts += pairs or [word]
    return frozenset(parts)
