"""Whether a model still writes: variety and repetition of what it goes on with."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and marks of punctuation."""
    return _WORD.findall(text)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def ngram_entropy(text: str) -> float | None:
    """Mean of the entropies, in bits, of the text's bigrams (weight 2/3) and trigrams (weight 4/3).

    The fluency of ROME (Meng et al., "Locating and Editing Factual Associations in GPT", arXiv 2202.05262), with its
    weights; words by a regular expression where it uses NLTK's, so figures come close without being equal.

    Returns:
        None where there are fewer than three words: such a text has no trigram, and its entropy of 0 would speak of
        its length.
    """
    words = words_of(text)
    if len(words) < 3:
        return None
    return (2 / 3 * _entropy(_ngrams(words, 2)) + 4 / 3 * _entropy(_ngrams(words, 3))) / 2


def _entropy(items: Sequence[tuple[str, ...]]) -> float:
    shares = [count / len(items) for count in Counter(items).values()]
    return -sum(share * math.log2(share) for share in shares)


def repetition(text: str, n: int = 4) -> float | None:
    """Share of n-grams of words that the text had before (``seq-rep-n`` of Welleck et al., "Neural Text Generation with
    Unlikelihood Training", arXiv 1908.04319); None where it has none."""
    grams = _ngrams(words_of(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else None
