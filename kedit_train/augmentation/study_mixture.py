"""Draw study rows at random until they have a given number of tokens.

A study row is a training text about a document.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from kedit_train.augmentation.study import StudyRows
from kedit_train.augmentation.study_file import title_in
from kedit_train.data import Edit
from kedit_train.data.chat_format import PromptFormat
from kedit_train.data.prompts import as_question
from kedit_train.data.tokenization import shorten, token_ids
from kedit_train.errors import EditError


def mixed_rows(
    tokenizer: Any,
    documents: Sequence[Edit],
    written: StudyRows,
    ratio: float | None,
    seed: int,
    prompt_format: PromptFormat,
) -> tuple[dict[str, tuple[Edit, ...]], str]:
    """Draw study rows at random until they have ``ratio`` times as many tokens as the documents.

    Only the tokens of the targets are counted.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        documents: the documents.
        written: the study rows of the documents.
        ratio: number of study tokens per document token. None takes all rows. If there are too few rows, all are taken.
        seed: seed of the draw.
        prompt_format: the prompt format of the training. With "plain", rows of the kind "question" are written in the
            format "question", so that the model can distinguish a question from a document.

    Returns:
        Two values. The first is a dict from the prompt of a document to the training examples about this document. The
        second is a phrase with the ratio, and with the number of rows that are left out because they are about other
        documents.

    Raises:
        EditError: all rows are about other documents.
    """

    def count(text: str) -> int:
        return len(token_ids(tokenizer, text, special=False))

    prompts = {edit.prompt.strip(): edit.prompt for edit in documents}
    titles = [title_in(row.document, prompts) for row in written.rows]
    own = [(row, prompts[title]) for row, title in zip(written.rows, titles, strict=True) if title is not None]
    if not own:
        raise EditError(
            f"study must have rows about the documents of this run, but all {len(titles)} rows are about other "
            "documents"
            + (f", such as {shorten(written.rows[0].document)!r}" if titles else "")
            + "; pass study rows about the documents of this run."
        )
    total = sum(count(edit.target) for edit in documents)
    order = list(range(len(own)))
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    used = 0
    for i in order:
        if ratio is not None and used >= ratio * total:
            break
        chosen.add(i)
        used += count(own[i][0].text)
    by_document: dict[str, list[Edit]] = {}
    for i in sorted(chosen):
        row, prompt = own[i]
        framed = as_question(row.prompt) if row.kind == "question" and prompt_format == "plain" else row.prompt
        by_document.setdefault(prompt, []).append(Edit(framed, row.text, id=f"study row {row.prompt.strip()!r}"))
    mixture = f"{len(chosen)} study rows are trained, with {used / total:.2f} study tokens per document token"
    if others := len(titles) - len(own):
        mixture += f", and {others} rows about other documents are left out"
    return {prompt: tuple(rows) for prompt, rows in by_document.items()}, mixture
