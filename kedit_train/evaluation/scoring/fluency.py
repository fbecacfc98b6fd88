"""Fluency of generated text: variety and repetition of n-grams."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def split_words(text: str) -> list[str]:
    """Split a text into words and punctuation marks."""
    return _WORD.findall(text)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def ngram_entropy(text: str) -> float | None:
    """Return the weighted mean entropy, in bits, of a text's bigrams (weight 2/3) and trigrams (weight 4/3).

    This is the fluency score of ROME, with the same weights for bigrams and trigrams. Words are split by a regular
    expression instead of NLTK, so the values are close to the published values but not equal.

    Returns:
        The entropy, or None for a text with fewer than three words. Such a text has no trigram, and an entropy of 0
        would only reflect the length of the text.

    References:
        Meng et al., "Locating and Editing Factual Associations in GPT", arXiv 2202.05262.
    """
    words = split_words(text)
    if len(words) < 3:
        return None
    return (2 / 3 * _entropy(_ngrams(words, 2)) + 4 / 3 * _entropy(_ngrams(words, 3))) / 2


def _entropy(items: Sequence[tuple[str, ...]]) -> float:
    shares = [count / len(items) for count in Counter(items).values()]
    return -sum(share * math.log2(share) for share in shares)


def repetition(text: str, n: int = 4) -> float | None:
    """Return the fraction of word n-grams that occurred earlier in the text (``seq-rep-n``).

    Returns:
        The fraction, or None for a text with fewer than ``n`` words.

    References:
        Welleck et al., "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319.
    """
    grams = _ngrams(split_words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else None
