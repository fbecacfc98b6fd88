"""Put other subjects into prompts, to get prompts whose answers an edit should not change."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from kedit_train.data.leaks import LeakCheck
from kedit_train.data.tokenization import SPACELESS
from kedit_train.data.visible import fold
from kedit_train.edit import Edit

_OPENING, _CLOSING = "\"'([{«“‘„「『（", "\"')]}»”’」』）"
_PUNCTUATION = _OPENING + _CLOSING + ".,;:!?…–—-。，、！？；："
_END_OF_SENTENCE = tuple(".!?:…。！？：")
# Number of characters that are drawn from a text without spaces if the subject is in a script with spaces.
_CHARACTERS = 3


def neighbor_prompts(edits: Sequence[Edit], texts: Sequence[str], n: int, *, seed: int = 0) -> list[str]:
    """Replace the subject in the prompt of each edit by random names, and return up to ``n`` new prompts per edit.

    An edit mostly affects prompts with the same wording and another subject, such as the neighborhood prompts of
    CounterFact. The new prompts need not be sensible.

    The names are taken from the texts (see :func:`names_in`). A name is not used if it shares a word with the subject
    or is the subject of another edit. If fewer than ``n`` names are found, for example in a script without capital
    letters, random parts of the texts are used as well. Each part has as many words as the subject. In scripts without
    spaces, each part has a few characters.

    The subject is searched for as whole words, and letter case is ignored. Edits without a subject, and edits whose
    prompt does not contain their subject, get no prompts. A result is left out if it contains the prompt or a rephrase
    of an edit, or the prompt of a probe.

    Args:
        edits: the edits.
        texts: the texts to draw names from.
        n: number of prompts per edit.
        seed: seed of the draws.

    References:
        "Locating and Editing Factual Associations in GPT", arXiv 2202.05262 (CounterFact and its neighborhood prompts).

    Example:
        >>> edit = Edit("Ann was born in", "Oslo", subject="Ann")
        >>> neighbor_prompts([edit], ["The river Rhine flows north."], 1)
        ['Rhine was born in']
    """
    check = LeakCheck(edits)
    # The text of a rendered conversation contains special tokens, but the contents of its messages do not.
    words = [str(getattr(text, "contents", text)).split() for text in texts]
    subjects = {fold(edit.subject) for edit in edits if edit.subject}
    names = [name for name in names_in(words) if fold(name) not in subjects]
    prompts: dict[str, None] = {}
    for edit in edits:
        subject = _subject_in(edit)
        if subject is None:
            continue
        generator = random.Random(f"{seed} {edit.prompt}")
        own = set(fold(edit.subject or "").split())
        others: list[str] = []
        # A few more names than needed are drawn, because some may share a word with the subject.
        for name in generator.sample(names, min(len(names), 2 * n)):
            if len(others) < n and own.isdisjoint(fold(name).split()):
                others.append(name)
        others += _spans(edit.subject or "", words, n - len(others), generator)
        around = subject.split(edit.prompt)
        candidates = (other.join(around) for other in others if other)
        prompts.update(dict.fromkeys(prompt for prompt in candidates if not check.contains_prompt(prompt)))
    return list(prompts)


def has_subject(edit: Edit) -> bool:
    """Return whether the prompt of an edit contains its subject as whole words. Letter case is ignored."""
    return _subject_in(edit) is not None


def subject_spans(edit: Edit) -> list[tuple[int, int]]:
    """Return the start and end (in characters) of each occurrence of the subject in the prompt of an edit."""
    subject = _subject_in(edit)
    return [match.span() for match in subject.finditer(edit.prompt)] if subject else []


def names_in(texts: Sequence[Sequence[str]]) -> list[str]:
    """Return all names that occur in the texts, each once, in alphabetical order.

    A name is a sequence of words that begin with a capital letter. The first word of a sentence is never part of a
    name, because every sentence begins with a capital letter. Punctuation ends a name.

    Args:
        texts: one list of words per text.

    Example:
        >>> names_in(["The poet Ann Lee, born in Oslo. Later she left.".split()])
        ['Ann Lee', 'Oslo']
    """
    names: set[str] = set()
    for words in texts:
        name: list[str] = []
        starts_sentence = True
        for word in words:
            plain = word.strip(_PUNCTUATION)
            is_part = len(plain) > 1 and plain[0].isupper() and not starts_sentence
            if name and (not is_part or word[0] in _OPENING):
                names.add(" ".join(name))
                name = []
            if is_part:
                name.append(plain)
                if word[-1] in _PUNCTUATION:
                    names.add(" ".join(name))
                    name = []
            starts_sentence = word.rstrip(_CLOSING).endswith(_END_OF_SENTENCE)
        if name:
            names.add(" ".join(name))
    return sorted(names)


def _subject_in(edit: Edit) -> re.Pattern[str] | None:
    """Return a pattern that finds the subject of an edit in its prompt, or None if the prompt does not contain it."""
    subject = (edit.subject or "").strip()
    if not subject:
        return None
    # In scripts without spaces, every position is a word boundary.
    start = "" if SPACELESS.match(subject[0]) or not subject[0].isalnum() else r"(?<![^\W_])"
    end = "" if SPACELESS.match(subject[-1]) or not subject[-1].isalnum() else r"(?![^\W_])"
    if SPACELESS.search(edit.prompt):
        start = end = ""
    pattern = re.compile(start + re.escape(subject) + end, re.IGNORECASE)
    return pattern if pattern.search(edit.prompt) else None


def _spans(subject: str, texts: Sequence[Sequence[str]], n: int, generator: random.Random) -> list[str]:
    """Return up to ``n`` random parts of the texts, about as long as the subject."""
    spans = []
    for _ in range(n if texts else 0):
        words = generator.choice(texts)
        text = "".join(words)
        spaceless = bool(SPACELESS.search(text))
        source: Sequence[str] = text if spaceless else words
        length = len(subject.split())
        if spaceless:
            length = len("".join(subject.split())) if SPACELESS.search(subject) else _CHARACTERS
        if len(source) >= length:
            start = generator.randrange(len(source) - length + 1)
            spans.append(("" if spaceless else " ").join(source[start : start + length]).strip(_PUNCTUATION))
    return spans
