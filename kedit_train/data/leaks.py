"""Further rows to train on beside the edits, and the guard that keeps what edits are scored on out of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from kedit_train.data.tokenization import SPACELESS, separator
from kedit_train.edit import Edit
from kedit_train.errors import EditError


def with_prefixes(edits: Sequence[Edit], prefixes: Sequence[str], per_edit: int, seed: int = 0) -> list[Edit]:
    """Pseudo-paraphrases: every edit's own prompt behind ``per_edit`` different prefixes, with the same target.

    Gangadhar & Stratos, "Model Editing by Standard Fine-Tuning" (arXiv 2402.11078). Which prefixes an edit gets hangs
    on ``seed`` and its own prompt alone, not on the edits beside it.

    Returns:
        ``per_edit * len(edits)`` rows without rephrases or probes.

    Raises:
        EditError: fewer prefixes than an edit shall get.
    """
    if not 0 <= per_edit <= len(set(prefixes)):
        raise EditError(f"with_prefixes: per_edit={per_edit} of {len(set(prefixes))} different prefixes: give more")
    pool = list(dict.fromkeys(prefixes))
    return [
        Edit(f"{prefix}{separator(prefix, edit.prompt)}{edit.prompt}", edit.target, id=f"{edit.id} behind a prefix")
        for edit in edits
        for prefix in random.Random(f"{seed} {edit.prompt}").sample(pool, per_edit)
    ]


def scored_prompts(edit: Edit) -> list[str]:
    """What an edit is scored on beside its own prompt: its rephrases, and the prompts of its probes."""
    probes = [*edit.locality.values(), *edit.portability.values()]
    return [*edit.rephrases, *(probe.prompt for kind in probes for probe in kind)]


class LeakGuard:
    """Tells what may not be trained on beside ``edits``. Case and the width of white space make no difference.

    Its questions take time in the length of the text, not in the number of edits.
    """

    def __init__(self, edits: Iterable[Edit]) -> None:
        edits = list(edits)
        self._scored = _Phrases(prompt for edit in edits for prompt in scored_prompts(edit))
        self._prompts = _Phrases(edit.prompt for edit in edits)
        self._subjects = _Phrases((edit.subject for edit in edits if edit.subject), words=True)

    def scored(self, text: str) -> bool:
        """Whether a rephrase of an edit, or a probe's prompt, is in ``text``."""
        return self._scored.any_in(text)

    def edited(self, text: str) -> bool:
        """Whether an edit's prompt is in ``text``, or its subject, as whole words."""
        return self._prompts.any_in(text) or self._subjects.any_in(text)

    def refuses(self, row: Edit) -> bool:
        """Whether a row that belongs to no edit has to be left out: it is scored, or its prompt is about an edit."""
        return self.edited(row.prompt) or self.scored(f"{row.prompt}{separator(row.prompt, row.target)}{row.target}")


class _Phrases:
    """Many phrases, sought in a text at once: looked up by their first characters at every position."""

    KEY = 12

    def __init__(self, phrases: Iterable[str], words: bool = False) -> None:
        self.words = words
        self.by_key: dict[str, set[str]] = defaultdict(set)
        for phrase in map(plain, phrases):
            self.by_key[phrase[: self.KEY]].add(phrase)
        self.lengths = sorted({len(key) for key in self.by_key})

    def any_in(self, text: str) -> bool:
        text = plain(text)
        return any(
            text.startswith(phrase, at) and (not self.words or _whole(text, at, at + len(phrase)))
            for length in self.lengths
            for at in range(len(text) - length + 1)
            for phrase in self.by_key.get(text[at : at + length], ())
        )


def plain(text: str) -> str:
    """Without regard to case and the width of white space."""
    return " ".join(text.casefold().split())


def says(text: str, phrase: str) -> bool:
    """Whether ``phrase`` is in ``text`` as whole words; both are ``plain``."""
    at = text.find(phrase)
    while at >= 0 and not _whole(text, at, at + len(phrase)):
        at = text.find(phrase, at + 1)
    return at >= 0


def _whole(text: str, start: int, end: int) -> bool:
    """Whether no word goes on over either border; scripts without spaces have none."""
    return not any(
        0 < at < len(text) and all(c.isalnum() and not SPACELESS.match(c) for c in text[at - 1 : at + 1])
        for at in (start, end)
    )
