"""Choose study rows so that their tokens have a given ratio to the tokens of the documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from kedit_train.augmentation.study import StudyRow, StudyRows
from kedit_train.data import Edit
from kedit_train.data.chat_format import PromptFormat
from kedit_train.data.prompts import as_question
from kedit_train.data.tokenization import token_ids


def mixed_rows(
    tokenizer: Any,
    documents: Sequence[Edit],
    written: StudyRows,
    ratio: float | None,
    seed: int,
    prompt_format: PromptFormat,
) -> tuple[dict[str, tuple[Edit, ...]], str]:
    """Draw study rows at random until they have ``ratio`` target tokens per target token of the documents.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        documents: the documents.
        written: the study rows of the documents.
        ratio: number of study tokens per document token. None takes all rows. If there are too few rows, all are taken.
        seed: seed of the draw.
        prompt_format: the prompt format of the training. In plain text, questions are framed as with the format
            "question", so that the model can tell them from a document.

    Returns:
        A dict from the prompt of a document to the training examples of its rows, and one phrase with the ratio.
    """

    def count(text: str) -> int:
        return len(token_ids(tokenizer, text, special=False))

    total = sum(count(edit.target) for edit in documents)
    order = list(written.rows)
    random.Random(seed).shuffle(order)
    chosen: set[StudyRow] = set()
    used = 0
    for row in order:
        if ratio is not None and used >= ratio * total:
            break
        chosen.add(row)
        used += count(row.text)
    prompts = {edit.prompt.strip(): edit.prompt for edit in documents}
    by_document: dict[str, list[Edit]] = {}
    for row in written.rows:
        if row in chosen:
            framed = as_question(row.prompt) if row.kind == "question" and prompt_format == "plain" else row.prompt
            name = f"study row {row.prompt.strip()!r}"
            by_document.setdefault(prompts[row.document], []).append(Edit(framed, row.text, id=name))
    mixture = f"{len(chosen)} study rows are trained, {used / total:.2f} study tokens per document token"
    return {prompt: tuple(rows) for prompt, rows in by_document.items()}, mixture
