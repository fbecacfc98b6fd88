"""Read the answer of a model that thinks before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedit_train.data.prompts import END_THINK, THINK


def after_thoughts(tokenizer: Any, ids: Sequence[int], *, ended: bool) -> list[int]:
    """Return the tokens of the answer, which begins after ``</think>``.

    Args:
        tokenizer: the tokenizer of the model.
        ids: the generated tokens, both thoughts and answer.
        ended: True if the model ended the text, False if a limit on the number of tokens cut the text.

    Returns:
        - If the text contains ``</think>``: the tokens after the first ``</think>``.
        - If the text contains neither ``<think>`` nor ``</think>``, and the model ended it: all tokens, because the
          model did not think.
        - Otherwise: an empty list.
    """
    ids = list(ids)

    def text(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    if END_THINK not in text(len(ids)):
        return ids if ended and THINK not in text(len(ids)) else []
    low, high = 1, len(ids)
    # Decoding more tokens never removes the tag. So bisection finds the token that completes the tag.
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if END_THINK in text(middle) else (middle + 1, high)
    return ids[low:]
