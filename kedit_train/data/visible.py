"""Find visible characters in texts, and normalize texts before they are compared."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

# Control and format characters (such as the zero-width space) and all kinds of white space.
INVISIBLE_CATEGORIES = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))
# Invisible characters of other categories: fillers, the braille blank, joiners and variation selectors.
INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0"
    + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
)


def is_visible(text: str) -> bool:
    """Return whether a text has a character that a reader can see.

    Example:
        >>> is_visible(" Bern"), is_visible(" "), is_visible("\\u200b")
        (True, False, False)
    """
    return any(map(_is_visible, text))


def normalize(text: str) -> str:
    """Return the text in Unicode's form NFKC, without invisible characters, and with single spaces between words.

    Two texts with the same result look the same, or differ only in white space and in the width or style of characters.

    Example:
        >>> normalize("\\uff21da\\u200b  lives\\tin Zu\\u0308rich") == "Ada lives in Z\\u00fcrich"
        True
    """
    if not (text.isascii() and text.isprintable()):
        text = unicodedata.normalize("NFKC", "".join(c for c in text if c.isspace() or _is_visible(c)))
    return " ".join(text.split())


def fold(text: str) -> str:
    """Normalize the text with :func:`normalize`, and fold its case, so that comparisons ignore letter case.

    Example:
        >>> fold("The  Capital\\tof FRANCE ")
        'the capital of france'
    """
    # Folding the case of a character can return characters that are not in form NFKC.
    return normalize(normalize(text).casefold())


@lru_cache(maxsize=10_000)
def _is_visible(character: str) -> bool:
    return character not in INVISIBLE and unicodedata.category(character) not in INVISIBLE_CATEGORIES


def without_spaces(text: str) -> str:
    """Return the text without white space, to find a prompt in a text that contains it with other white space.

    Example:
        >>> without_spaces("Ada lives") in without_spaces("User:\\nAda  lives in Bern")
        True
    """
    return "".join(text.split())
