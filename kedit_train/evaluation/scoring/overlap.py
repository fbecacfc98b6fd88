"""Overlap of a generated text with a whole target of several sentences (ROUGE-L)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kedit_train.data.tokenization import SPACELESS

_WORD = re.compile(r"\w+")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return the F-measure of ROUGE-L between an answer and the most similar reference, computed by torchmetrics.

    ROUGE-L is based on the longest common subsequence of words. Letter case and punctuation are ignored. In scripts
    without spaces, every character counts as a word.

    Args:
        answer: the generated text.
        references: at least one text that counts as right.

    Returns:
        A number from 0 (no common word) to 1 (the same words in the same order).

    References:
        Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", aclanthology.org/W04-1013.

    Example:
        >>> rouge_l("The ferry sails at noon.", ["the ferry sails at night"])
        0.8
    """
    from torchmetrics.functional.text.rouge import rouge_score

    scores = rouge_score(
        answer, [list(references)], rouge_keys="rougeL", accumulate="best", normalizer=str.casefold, tokenizer=_words
    )
    return round(float(scores["rougeL_fmeasure"]), 6)


def _words(text: str) -> list[str]:
    words: list[str] = []
    for word in _WORD.findall(text):
        words += list(word) if SPACELESS.search(word) else [word]
    return words
