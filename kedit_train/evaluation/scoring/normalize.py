"""When two answers are the same answer.

SQuAD's normalisation (Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", arXiv
1606.05250: case, punctuation, articles and white space do not count) with three departures, each because the original
calls different facts equal:

- a decimal point and a minus sign stay, so that "3.5" is neither "35" nor "3 5", and "-5" is not "5"; a comma goes
  only where it groups thousands ("1,000" is "1000");
- "a", "an" and "the" go only where a word follows, so that "Vitamin A" is not "Vitamin", and "The" is still a word;
- "+" and "#" stay behind a letter: "C", "C++" and "C#" are three languages.

Nothing that has a visible character is ever normalised to nothing, so no answer matches by being empty.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_GROUPING_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
_MINUS = "-\u2212\u2013"


def _kept(text: str, at: int) -> str:
    """What is left of the character at ``at``: itself, its plain form, or nothing."""
    char = text[at]
    if unicodedata.category(char)[0] not in "PS":
        return char
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if char in ".," and after.isdigit() and not before.isalpha():
        return char if char == "." or before.isdigit() else ""
    if char in _MINUS and (after.isdigit() or after == ".") and (not before or before.isspace()):
        return "-"
    if char in "+#" and (before.isalpha() or before in ("+", "#")) and not after.isalnum():
        return char
    return ""


def normalise(text: str) -> str:
    """``text`` without what does not count when answers are compared; empty only where ``text`` is blank."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    ungrouped = _GROUPING_COMMA.sub("", plain)
    bare = " ".join("".join(_kept(ungrouped, at) for at in range(len(ungrouped))).split())
    return _ARTICLE.sub("", bare).strip() or bare or plain


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether ``answer`` is, after :func:`normalise`, one of the ``accepted`` spellings. An empty answer never is."""
    if isinstance(accepted, str):
        raise TypeError("accepted must be a sequence of answers, not one string: wrap it in a tuple")
    given = normalise(answer)
    return bool(given) and any(given == normalise(spelling) for spelling in accepted)


def contains(answer: str, accepted: Sequence[str]) -> bool:
    """Whether, after :func:`normalise`, one of the ``accepted`` spellings stands in ``answer`` as whole words."""
    if isinstance(accepted, str):
        raise TypeError("accepted must be a sequence of answers, not one string: wrap it in a tuple")
    given = f" {normalise(answer)} "
    return any(found and f" {found} " in given for found in map(normalise, accepted))
