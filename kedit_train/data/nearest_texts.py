"""Of many texts those whose answers an edit puts in danger first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from heapq import nsmallest
from typing import Any

from kedit_train.data.leaks import plain, says
from kedit_train.data.tokenization import SPACELESS
from kedit_train.edit import Edit

WORD = re.compile(r"\w+")


def nearest_texts(texts: Sequence[str], edits: Sequence[Edit], n: int) -> list[str]:
    """For each edit the ``n`` texts nearest to it; the union, each text once, in the order given.

    Nearer are those that hold the edit's old answer, as whole words, and among them (and among the rest) those that
    share more words with its prompt, its subject left out. What a lone edit changes elsewhere is, first of all, the
    answers of others that had its old answer, most in its own wording ("neighbours": CounterFact's neighborhood
    prompts, arXiv 2202.05262). A text that names the subject of an edit together with its old answer states what that
    edit changes, and is never taken. Letter case makes no difference; scripts without spaces are compared by pairs of
    characters; of equals the earlier text is nearer.
    """
    known = [(plain(edit.subject or ""), plain(edit.old_target or "").rstrip(".")) for edit in edits]
    left: list[tuple[str, str, frozenset[str]]] = []
    for text in dict.fromkeys(texts):
        said = plain(text)
        if not any(subject and old and says(said, subject) and says(said, old) for subject, old in known):
            left.append((text, said, _words(said)))
    chosen: set[str] = set()
    for edit, (subject, old) in zip(edits, known, strict=True):
        asked = plain(edit.prompt)
        asked_words = _words(asked.replace(subject, " ") if subject else asked)

        def rank(each: tuple[str, str, frozenset[str]], old: str = old, words: frozenset[str] = asked_words) -> Any:
            return not (old and says(each[1], old)), -len(words & each[2])

        chosen.update(text for text, *_ in nsmallest(n, left, key=rank))
    return [text for text, *_ in left if text in chosen]


def _words(text: str) -> frozenset[str]:
    found: list[str] = []
    for word in WORD.findall(text):
        pairs = [word[i : i + 2] for i in range(len(word) - 1)] if SPACELESS.search(word) else []
        found += pairs or [word]
    return frozenset(found)
