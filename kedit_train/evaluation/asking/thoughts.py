"""Read the answer of a model that thinks before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedit_train.data.prompts import END_THINK, THINK


def after_thoughts(tokenizer: Any, ids: Sequence[int], *, ended: bool) -> list[int]:
    """Return the tokens of the answer: those after ``</think>``.

    Args:
        tokenizer: the tokenizer of the model.
        ids: the generated tokens: thoughts and answer.
        ended: True if the model ended the text, False if a limit on the number of tokens cut the text.

    Returns:
        The tokens after the first ``</think>``, or an empty list if there is no ``</think>``. There is one exception:
        if the model ended a text with neither ``<think>`` nor ``</think>``, it did not think, and the result contains
        all tokens.
    """
    ids = list(ids)

    def text(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    if END_THINK not in text(len(ids)):
        return ids if ended and THINK not in text(len(ids)) else []
    low, high = 1, len(ids)
    # More tokens never remove the tag, so its last token is found by bisection.
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if END_THINK in text(middle) else (middle + 1, high)
    return ids[low:]
