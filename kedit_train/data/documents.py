"""Split long documents into parts that fit into the context of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

from kedit_train.arguments import check_arguments, integer_from, optional
from kedit_train.data.dataset import EditDataset
from kedit_train.data.prompts import PromptFormat, encode_in_format
from kedit_train.data.tokenization import shorten, token_ids
from kedit_train.data.visible import fold
from kedit_train.edit import Edit
from kedit_train.errors import EditError, reported_by, warn

# The ends of paragraphs, sentences, words and characters. A text is split at the first of these kinds that gives parts
# of at most the maximum length.
_ENDS = tuple(
    re.compile(pattern) for pattern in (r"\n\s*\n", r"[.!?…][\"'”’)\]]*\s+|[。！？]+\s*", r"\s+|[、，；]", r"(?s:.)")
)


def split_documents(
    edits: EditDataset, tokenizer: Any, max_length: int | None, *, prompt_format: PromptFormat = "plain"
) -> EditDataset:
    """Split each edit with more than ``max_length`` tokens into several edits, called parts.

    The target is split at the ends of paragraphs or sentences, and within a sentence only if the sentence is too long.
    No text is dropped. The first part keeps the prompt, the identifier and all questions of the edit. The prompts of
    the other parts end with "(part 2)", "(part 3)" and so on. A number is skipped if another edit already has the
    prompt with this number. A warning gives the number of edits that were split.

    ``EditDataModule`` and the command ``sft`` call this function for documents, with the context length of the model.

    Args:
        edits: the edits, for example documents that ``EditDataset.load`` read from a folder.
        tokenizer: a tokenizer of ``transformers``.
        max_length: maximum number of tokens of an edit: prompt, target and end token. With None, no edit is split.
        prompt_format: the prompt format of the training: "plain", "chat", "question" or a ``ChatFormat``.

    Raises:
        EditError: ``max_length`` is too small for a prompt and one token of its target.

    Example:
        >>> from kedit_train import Edit, EditDataset, world
        >>> tokenizer = world.load()[1]
        >>> news = EditDataset([Edit("News\\n\\n", "Ada lives in Bern. Ben lives in Rome.")])
        >>> len(split_documents(news, tokenizer, 512))
        1
    """
    check_arguments("split_documents", max_length=(max_length, optional(integer_from(1))))
    if max_length is None:
        return edits
    parts: list[Edit] = []
    split = 0
    used = {fold(edit.prompt) for edit in edits}
    with reported_by("split_documents"):
        for edit in edits:
            own = list(_parts(edit, tokenizer, max_length, prompt_format, used))
            split += len(own) > 1
            parts += own
        if split:
            warn(
                f"{split} of {len(edits)} edits of {edits.name} have more than {max_length} tokens and were split; "
                f"there are now {len(parts)} edits."
            )
    return EditDataset(parts, name=edits.name, format=edits.format, skipped=edits.skipped) if split else edits


def _parts(edit: Edit, tokenizer: Any, max_length: int, prompt_format: PromptFormat, used: set[str]) -> Iterator[Edit]:
    """Yield the parts of an edit, and add their prompts to ``used``."""
    end = tokenizer.eos_token_id is not None

    def length(prompt: str, target: str) -> int:
        return len(encode_in_format(tokenizer, prompt, target, prompt_format, append_eos=end).input_ids)

    if length(edit.prompt, edit.target) <= max_length:
        yield edit
        return
    room = max_length - length(_numbered(edit.prompt, 9999), ".")
    while room > 0:
        texts = [text.strip() for text in _packed(_units(tokenizer, edit.target, room, _ENDS), room) if text.strip()]
        prompts = _prompts(edit.prompt, len(texts), used)
        # A joined text may have more tokens than its pieces have when they are tokenized one by one.
        longest = max(map(length, prompts, texts))
        if longest <= max_length:
            break
        room = min(room - 1, max(1, room * max_length // longest))
    else:
        raise EditError(
            f"max_length must leave room for the prompt {shorten(edit.prompt)!r} and at least one token of its target, "
            f"got {max_length}; increase max_length, use a model with a longer context, or shorten the prompt."
        )
    yield replace(edit, target=texts[0])
    used.update(map(fold, prompts))
    for number in range(2, len(texts) + 1):
        name = f"{edit.id}, part {number}" if edit.id else ""
        yield Edit(prompts[number - 1], texts[number - 1], subject=edit.subject, id=name)


def _prompts(prompt: str, parts: int, used: set[str]) -> list[str]:
    """Return one prompt for each part of an edit. A part number is skipped if its prompt is already in ``used``."""
    numbered = (_numbered(prompt, number) for number in count(2))
    return [prompt, *islice((text for text in numbered if fold(text) not in used), parts - 1)]


def _numbered(prompt: str, number: int) -> str:
    """Add a part number to a prompt, before its trailing white space."""
    text = prompt.rstrip()
    return f"{text} (part {number}){prompt[len(text) :]}"


def _units(tokenizer: Any, text: str, room: int, ends: Sequence[re.Pattern[str]]) -> Iterator[tuple[str, int]]:
    """Split a text into pieces, and yield each piece with its number of tokens.

    A piece has at most ``room`` tokens, unless it is a single character.
    """
    at = 0
    for stop in [*(match.end() for match in ends[0].finditer(text)), len(text)]:
        piece, at = text[at:stop], stop
        length = len(token_ids(tokenizer, piece, special=False)) if piece else 0
        if length > room and len(ends) > 1:
            yield from _units(tokenizer, piece, room, ends[1:])
        elif piece:
            yield piece, length


def _packed(units: Iterator[tuple[str, int]], room: int) -> Iterator[str]:
    """Join consecutive pieces into texts of at most ``room`` tokens."""
    text, used = "", 0
    for piece, length in units:
        if text and used + length > room:
            yield text
            text, used = "", 0
        text, used = text + piece, used + length
    if text:
        yield text
