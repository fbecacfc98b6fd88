"""Choose texts on which an edit is most likely to change the predictions of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from heapq import nsmallest
from typing import Any

from kedit_train.data.leaks import contains_words
from kedit_train.data.tokenization import SPACELESS
from kedit_train.data.visible import fold
from kedit_train.edit import Edit

WORD = re.compile(r"\w+")


def nearest_texts(texts: Sequence[str], edits: Sequence[Edit], n: int) -> list[str]:
    """Choose the ``n`` nearest texts for each edit. Return each chosen text once, in the order of ``texts``.

    An edit mostly affects prompts that have a similar wording and the same old answer, but another subject. The
    neighborhood prompts of CounterFact are such prompts. Therefore, the texts are ranked by two criteria:

    1. Texts that contain the old answer of the edit (as whole words) are nearer than all other texts.
    2. If both texts contain the old answer, or neither does, the text with more words of the prompt is nearer. Words of
       the subject are not counted.

    If two texts are equally near by both criteria, the earlier text in ``texts`` is chosen.

    A text that contains the subject and the old answer of an edit states the fact that the edit changes. Such a text is
    never returned. Letter case is ignored. In scripts without spaces, pairs of characters are compared instead of
    words.

    Args:
        texts: the texts to choose from.
        edits: the edits.
        n: number of texts per edit.

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
    """Return the words of a text. In scripts without spaces, return pairs of adjacent characters instead."""
    parts: list[str] = []
    for word in WORD.findall(text):
        pairs = [word[i : i + 2] for i in range(len(word) - 1)] if SPACELESS.search(word) else []
        parts += pairs or [word]
    return frozenset(parts)
