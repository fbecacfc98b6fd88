"""Convert edits to the rows of a ``datasets.Dataset``, for trainers that need such a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kedit_train.data.chat_format import PromptFormat, chat_format
from kedit_train.data.prompts import as_question
from kedit_train.data.tokenization import Encoded, separator
from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.functional.labels import IGNORE_INDEX
from kedit_train.optional import require

if TYPE_CHECKING:
    import datasets


def prompt_completion_rows(edits: Iterable[Edit], prompt_format: PromptFormat) -> list[dict[str, Any]]:
    """Return rows with the columns ``prompt`` and ``completion``.

    Raises:
        EditError: the format is a ``ChatFormat`` with ``thinking=True``.
    """
    chat = chat_format(prompt_format)
    if chat is not None and chat.thinking:
        raise EditError(
            "prompt_format must have thinking=False, because SFTTrainer would train on the thinking block; use "
            "to_tokens(tokenizer, prompt_format=...), which leaves the block out of the loss"
        )
    rows: list[dict[str, Any]] = []
    for edit in edits:
        if chat is not None:
            *prompt, answer = chat.messages(edit.prompt, edit.target)
            rows.append({"prompt": prompt, "completion": [answer]})
            continue
        text = as_question(edit.prompt) if prompt_format == "question" else edit.prompt
        rows.append({"prompt": text, "completion": separator(text, edit.target) + edit.target})
    return rows


def token_rows(examples: Iterable[Encoded]) -> list[dict[str, Any]]:
    """Return rows with the columns ``input_ids`` and ``labels``. Labels are -100 outside of the target."""
    return [
        {
            "input_ids": example.input_ids,
            "labels": [IGNORE_INDEX] * example.target_start + example.input_ids[example.target_start :],
        }
        for example in examples
    ]


def to_dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """Return a ``datasets.Dataset`` with the given rows.

    Raises:
        EditError: the package ``datasets`` is not installed.
    """
    with require("datasets", extra="trl"):
        import datasets

    return datasets.Dataset.from_list(list(rows))
