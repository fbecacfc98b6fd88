"""Compare two texts word by word, and mark the differences in HTML."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from html import escape

from kedit_train.data.tokenization import SPACELESS

# A word or one other character, with the white space before it. A character of a script without spaces is a word.
_WORDS = re.compile(rf"\s*(?:{SPACELESS.pattern}|(?:(?!{SPACELESS.pattern})\w)+|[^\w\s])")


def mark_changes(before: str, after: str) -> tuple[str, str]:
    """Return both texts as HTML. Removed words are in ``<del>`` elements, and added words are in ``<ins>`` elements.

    Special characters of HTML are escaped. White space at the beginning and the end of a text is ignored.

    Args:
        before: the old text, as plain text.
        after: the new text, as plain text.

    Example:
        >>> mark_changes("Ada lives in Rome.", "Ada lives in <b>Bern</b>.")[0]
        'Ada lives in <del>Rome</del>.'
        >>> mark_changes("a & b", "a & b")
        ('a &amp; b', 'a &amp; b')
    """
    old, new = _WORDS.findall(before.strip()), _WORDS.findall(after.strip())
    # Words are compared without the white space before them. Without autojunk=False, difflib would ignore frequent
    # words of texts with more than 200 words.
    words = SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    left, right = [], []
    for change, i, j, k, end in words.get_opcodes():
        left.append(_marked("del" if change != "equal" else "", "".join(old[i:j])))
        right.append(_marked("ins" if change != "equal" else "", "".join(new[k:end])))
    return "".join(left), "".join(right)


def _marked(tag: str, text: str) -> str:
    """Return ``text`` as HTML, in a ``tag`` element unless ``tag`` is empty. Leading white space stays outside."""
    word = text.lstrip()
    space = text[: len(text) - len(word)]
    return space + (f"<{tag}>{escape(word)}</{tag}>" if tag and word else escape(word))
