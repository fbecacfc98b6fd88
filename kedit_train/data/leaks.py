"""Leak checks: find training examples that contain evaluation prompts of the edits."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from kedit_train.data.tokenization import SPACELESS, separator
from kedit_train.data.visible import fold
from kedit_train.edit import Edit, scored_prompts
from kedit_train.errors import EditError


def with_prefixes(edits: Sequence[Edit], prefixes: Sequence[str], per_edit: int, seed: int = 0) -> list[Edit]:
    """Make ``per_edit`` pseudo-paraphrases of each edit. A pseudo-paraphrase is a prefix, followed by the prompt.

    All pseudo-paraphrases of an edit have the same target as the edit. Each of them has a different prefix, drawn at
    random from ``prefixes``. The draw depends on ``seed`` and on the prompt of the edit, but not on the other edits.

    Args:
        edits: the edits.
        prefixes: the texts to draw prefixes from.
        per_edit: number of pseudo-paraphrases for each edit.
        seed: seed of the draws.

    Returns:
        ``per_edit * len(edits)`` edits, without rephrases and without probes.

    Raises:
        EditError: there are fewer different prefixes than ``per_edit``.

    References:
        Model Editing by Standard Fine-Tuning, arXiv 2402.11078.

    Example:
        >>> edit = Edit("The capital of France is", "Lyon")
        >>> [example.prompt for example in with_prefixes([edit], ["It rains."], 1)]
        ['It rains. The capital of France is']
    """
    pool = list(dict.fromkeys(prefixes))
    if not 0 <= per_edit <= len(pool):
        raise EditError(
            f"per_edit must be an integer from 0 to {len(pool)} (the number of different prefixes), got {per_edit}; "
            "lower per_edit or give more prefixes.",
            component="with_prefixes",
        )
    return [
        Edit(f"{prefix}{separator(prefix, edit.prompt)}{edit.prompt}", edit.target, id=f"{edit.id} behind a prefix")
        for edit in edits
        for prefix in random.Random(f"{seed} {edit.prompt}").sample(pool, per_edit)
    ]


class LeakCheck:
    """Find texts that contain the subject or a prompt of an edit.

    Such texts should be kept out of additional training data. The prompts of an edit are ``edit.prompt``, the rephrases
    and the prompts of the probes (questions of the evaluation). Rephrases and prompts of probes are called scored
    prompts. The comparison ignores letter case, the amount of white space, invisible characters and Unicode forms
    (NFKC). The time of a check depends on the length of the text, not on the number of edits.

    Args:
        edits: the edits whose prompts, subjects, rephrases and probes are searched for.

    Example:
        >>> check = LeakCheck([Edit("The capital of France is", "Lyon", rephrases=("France's capital:",))])
        >>> check.contains_scored_prompt("FRANCE'S  capital: Paris"), check.contains_scored_prompt("France is big.")
        (True, False)
    """

    def __init__(self, edits: Iterable[Edit]) -> None:
        edits = list(edits)
        self._scored = _PhraseIndex(prompt for edit in edits for prompt in scored_prompts(edit))
        self._prompts = _PhraseIndex(edit.prompt for edit in edits)
        self._subjects = _PhraseIndex((edit.subject for edit in edits if edit.subject), whole_words=True)

    def contains_scored_prompt(self, text: str) -> bool:
        """Return whether the text contains a rephrase of an edit or the prompt of a probe."""
        return self._scored.any_in(text)

    def contains_prompt(self, text: str) -> bool:
        """Return whether the text contains any prompt of an edit: ``edit.prompt``, a rephrase, or a probe's prompt."""
        return self._prompts.any_in(text) or self._scored.any_in(text)

    def mentions_edit(self, text: str) -> bool:
        """Return whether the text contains ``edit.prompt`` of an edit, or the subject of an edit as whole words.

        Rephrases and prompts of probes are not searched for.
        """
        return self._prompts.any_in(text) or self._subjects.any_in(text)

    def is_leak(self, example: Edit) -> bool:
        """Return whether a training example is a leak and should be left out.

        An example is a leak if its prompt contains ``edit.prompt`` or the subject of an edit (:meth:`mentions_edit`).
        It is also a leak if its prompt and target together contain a rephrase or the prompt of a probe
        (:meth:`contains_scored_prompt`).
        """
        text = f"{example.prompt}{separator(example.prompt, example.target)}{example.target}"
        return self.mentions_edit(example.prompt) or self.contains_scored_prompt(text)


class _PhraseIndex:
    """Search a text for many phrases at once.

    The phrases are stored in a dict by their first characters. At every position of the text, the next characters are
    looked up in this dict.
    """

    KEY_LENGTH = 12

    def __init__(self, phrases: Iterable[str], whole_words: bool = False) -> None:
        self.whole_words = whole_words
        self.by_key: dict[str, set[str]] = defaultdict(set)
        # An empty phrase would be found in every text.
        for phrase in filter(None, map(fold, phrases)):
            self.by_key[phrase[: self.KEY_LENGTH]].add(phrase)
        self.lengths = sorted({len(key) for key in self.by_key})

    def any_in(self, text: str) -> bool:
        text = fold(text)
        return any(
            text.startswith(phrase, at) and (not self.whole_words or _ends_at_words(text, at, at + len(phrase)))
            for length in self.lengths
            for at in range(len(text) - length + 1)
            for phrase in self.by_key.get(text[at : at + length], ())
        )


def contains_words(text: str, phrase: str) -> bool:
    """Return whether ``text`` contains ``phrase`` as whole words. Both must already be folded (:func:`fold`)."""
    at = text.find(phrase)
    while at >= 0 and not _ends_at_words(text, at, at + len(phrase)):
        at = text.find(phrase, at + 1)
    return at >= 0


def _ends_at_words(text: str, start: int, end: int) -> bool:
    """Return whether ``start`` and ``end`` are word boundaries.

    In scripts without spaces, every position is a word boundary.
    """
    return not any(
        0 < at < len(text) and all(c.isalnum() and not SPACELESS.match(c) for c in text[at - 1 : at + 1])
        for at in (start, end)
    )
