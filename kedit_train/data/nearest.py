"""Of many texts those whose answers an edit puts in danger first."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kedit_train.data.edit import Edit

WORD = re.compile(r"\w+")


def nearest_texts(texts: Sequence[str], edits: Sequence[Edit], n: int) -> list[str]:
    """For each edit the ``n`` texts nearest to it; the union, in the order given.

    Nearer are those that hold the edit's old answer, and among them (and among the rest) those that share more words
    with its prompt, its subject left out. What a lone edit changes elsewhere is, first of all, the answers of others
    that had its old answer, most in its own wording ("neighbours": CounterFact's neighborhood prompts, arXiv
    2202.05262). Letter case makes no difference; of equals the earlier text is nearer.
    """
    folded = [text.casefold() for text in texts]
    words = [frozenset(WORD.findall(text)) for text in folded]
    # Many edits have the same old answer, and more the same wording.
    holding: dict[str, list[bool]] = {}
    sharing: dict[frozenset[str], list[int]] = {}
    chosen: set[int] = set()
    for edit in edits:
        old = (edit.old_target or "").strip().rstrip(".").casefold()
        asked = frozenset(WORD.findall(edit.prompt.replace(edit.subject or "", " ").casefold()))
        if old not in holding:
            holding[old] = [bool(old) and old in text for text in folded]
        if asked not in sharing:
            sharing[asked] = [len(asked & each) for each in words]
        rank = list(zip(holding[old], sharing[asked], strict=True))
        chosen.update(sorted(range(len(texts)), key=rank.__getitem__, reverse=True)[:n])
    return [text for number, text in enumerate(texts) if number in chosen]
