"""Check whether a text contains a visible character."""

from __future__ import annotations

import unicodedata

# Control and format characters (such as the zero-width space) and all kinds of white space.
INVISIBLE_CATEGORIES = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))
# Invisible characters of other categories: fillers, the braille blank, joiners and variation selectors.
INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10)))
)


def is_visible(text: str) -> bool:
    """Return whether a text has a character that a reader can see.

    Example:
        >>> is_visible(" Bern"), is_visible(" "), is_visible("\\u200b")
        (True, False, False)
    """
    return any(c not in INVISIBLE and unicodedata.category(c) not in INVISIBLE_CATEGORIES for c in text)
