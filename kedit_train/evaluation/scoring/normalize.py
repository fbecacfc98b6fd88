"""Comparison of answers: normalization, exact match and containment.

The normalization follows SQuAD (Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text",
arXiv 1606.05250), which ignores case, punctuation, articles and white space. Three rules differ from SQuAD, because
the original rules treat some different facts as equal:

- A decimal point and a minus sign are kept. So "3.5" is neither "35" nor "3 5", and "-5" is not "5". A comma between
  digits is removed only if it groups thousands. So "1,000" is "1000".
- "a", "an" and "the" are removed only before another word. So "Vitamin A" is not "Vitamin", and the answer "The" is
  kept.
- "+" and "#" are kept after a letter, because "C", "C++" and "C#" are three languages.

A text that contains only punctuation marks or symbols is kept. So "?" is not equal to "!".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_GROUPING_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
_MINUS = "-\u2212\u2013"


def _normalize_character(text: str, index: int) -> str:
    """Return the normalized form of one character: the character itself, a plain minus sign, or an empty string."""
    char = text[index]
    if unicodedata.category(char)[0] not in "PS":
        return char
    before, after = text[index - 1 : index], text[index + 1 : index + 2]
    if char in ".," and after.isdigit() and not before.isalpha():
        return char if char == "." or before.isdigit() else ""
    if char in _MINUS and (after.isdigit() or after == ".") and (not before or before.isspace()):
        return "-"
    if char in "+#" and (before.isalpha() or before in ("+", "#")) and not after.isalnum():
        return char
    return ""


def normalize(text: str) -> str:
    """Normalize an answer for comparison: lower the case, and remove punctuation, articles and extra white space.

    Args:
        text: an answer.

    Returns:
        The normalized text. It is empty only if ``text`` is blank.

    Example:
        >>> from kedit_train.evaluation import normalize
        >>> normalize("The United  States."), normalize("1,000 km"), normalize("C++")
        ('united states', '1000 km', 'c++')
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    ungrouped = _GROUPING_COMMA.sub("", plain)
    bare = " ".join("".join(_normalize_character(ungrouped, i) for i in range(len(ungrouped))).split())
    return _ARTICLE.sub("", bare).strip() or bare or plain


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Return True if ``answer`` equals one of the ``accepted`` answers after normalization.

    Args:
        answer: the generated answer. An empty answer never matches.
        accepted: the answers that count as right.

    Raises:
        TypeError: ``accepted`` is one string.

    Example:
        >>> from kedit_train.evaluation import exact_match
        >>> exact_match("the united states.", ["USA", "United States"]), exact_match("3.5", ["35"])
        (True, False)
    """
    _refuse_string(accepted)
    normalized = normalize(answer)
    return bool(normalized) and any(normalized == normalize(other) for other in accepted)


def contains(answer: str, accepted: Sequence[str]) -> bool:
    """Return True if ``answer`` contains one of the ``accepted`` answers as whole words, after normalization.

    Args:
        answer: the generated answer.
        accepted: the answers to look for.

    Raises:
        TypeError: ``accepted`` is one string.

    Example:
        >>> from kedit_train.evaluation import contains
        >>> contains("It is Paris, of course.", ["Paris"]), contains("Parish", ["Paris"])
        (True, False)
    """
    _refuse_string(accepted)
    padded = f" {normalize(answer)} "
    return any(other and f" {other} " in padded for other in map(normalize, accepted))


def _refuse_string(accepted: Sequence[str]) -> None:
    if isinstance(accepted, str):
        raise TypeError("accepted must be a sequence of answers, got one string; put the string into a list.")
