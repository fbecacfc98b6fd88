"""Tokenization of edits: token ids with the position of the target, and padded batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_train.arguments import cut
from kedit_train.errors import EditError
from kedit_train.functional.labels import IGNORE_INDEX

# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, CJK punctuation, kana, Bopomofo, Han and
# full-width forms. Hangul is not included, because Korean has spaces between words.
SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff00-\uff60\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Encoded:
    """A tokenized edit.

    :func:`collate` uses ``target_start`` to set the labels. It does not search for padding tokens, so the padding token
    may be the same as the end-of-text token.

    Args:
        input_ids: the token ids of prompt and target.
        target_start: the position of the first target token. ``input_ids[target_start:]`` is the target, including
            the end-of-text token if one was appended.
    """

    input_ids: list[int]
    target_start: int


def shorten(text: str, width: int = 60) -> str:
    """Return ``text`` on one line, for a message. A text longer than ``width`` characters is cut and ends with "…"."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def separator(prompt: str, target: str) -> str:
    """Return the text to put between prompt and target: a space or nothing.

    The result is a space, unless the prompt ends or the target begins with one of these characters:

    - white space
    - a character of a script without spaces between words (Chinese, Japanese, Thai and others)
    """
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    return "" if SPACELESS.match(prompt[-1]) or SPACELESS.match(target[0]) else " "


def token_ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Return the token ids of a text, without padding or truncation, regardless of the settings of the tokenizer.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        text: the text.
        special: True adds the special tokens that the tokenizer puts around a text.
    """
    encoding = tokenizer(text, add_special_tokens=special, padding=False, truncation=False, verbose=False)
    return list(encoding["input_ids"])


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt that a model will continue.

    If the tokenizer adds a begin-of-text token, the ids begin with this token. If the tokenizer appends an end-of-text
    token (``add_eos_token=True``), this function removes it, because otherwise the text would end before the answer.
    An end-of-text token that you wrote into the prompt is kept.

    Raises:
        EditError: the prompt has no tokens.
    """
    ids = token_ids(tokenizer, prompt, special=True)
    eos = tokenizer.eos_token_id
    if eos is not None and ids and ids[-1] == eos:
        written = count_at_end(token_ids(tokenizer, prompt, special=False), eos)
        ids = ids[: len(ids) - max(0, count_at_end(ids, eos) - written)]
    if not prompt or not ids:
        raise EditError(f"the prompt {shorten(prompt)!r} has no tokens; give a prompt that the model can continue")
    return ids


def count_at_end(ids: Sequence[int], token: int) -> int:
    """Return how many tokens at the end of ``ids`` are equal to ``token``."""
    count = 0
    while count < len(ids) and ids[-1 - count] == token:
        count += 1
    return count


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of ``text`` as the continuation of another text.

    Some tokenizers (Llama 2) put a space before every text that they tokenize. A continuation must not get this space.
    So this function puts a character in front of ``text`` and tokenizes both together. The space is then in front of
    the character. At the end, the function removes the tokens of the space and the character. It chooses a character
    that shares no token with ``text``.
    """
    for character in ("\n", "?", "a"):
        head = token_ids(tokenizer, character, special=False)
        both = token_ids(tokenizer, character + text, special=False)
        if head and len(both) > len(head) and both[: len(head)] == head:
            return both[len(head) :]
    return token_ids(tokenizer, text, special=False)


def encode_edit(
    tokenizer: Any,
    prompt: str,
    target: str,
    *,
    append_eos: bool = True,
    max_length: int | None = None,
    where: str = "",
) -> Encoded:
    """Tokenize a prompt together with its target. The tokens of the prompt are always those of :func:`encode_prompt`.

    Prompt and target are tokenized as one text. One token of this text may contain both the end of the prompt and the
    beginning of the target, for example if the prompt ends with a space. The target is then tokenized separately, so
    that the prompt has the same tokens in training and in generation.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        prompt: the prompt of an edit.
        target: the target of the edit. :func:`separator` decides whether a space is put in front of it.
        append_eos: end the target with exactly one end-of-text token, so that the edited model learns to stop.
        max_length: the maximum number of tokens, for example ``context_length(model.config)``. A longer edit is an
            error and is not truncated.
        where: the name of the edit in error messages, for example ``"facts.json, edit 3 (id '17758')"``.

    Raises:
        EditError: the edit is too long; the prompt or the target has no tokens; the target has characters that the
            tokenizer cannot encode; ``append_eos`` is True, but the tokenizer has no end-of-text token.
    """
    beginning = f"{where}: " if where else ""
    if append_eos and tokenizer.eos_token_id is None:
        raise EditError(
            f"{beginning}append_eos=True needs an end-of-text token, but the tokenizer has none; set "
            "tokenizer.eos_token, or pass append_eos=False"
        )
    end = tokenizer.eos_token_id if append_eos else None
    space = separator(prompt, target)
    return encode_pair(
        tokenizer, prompt, space, target, end=end, encode=encode_prompt, max_length=max_length, where=beginning
    )


def encode_pair(
    tokenizer: Any,
    prompt: str,
    space: str,
    target: str,
    *,
    end: int | None,
    encode: Callable[[Any, str], list[int]],
    max_length: int | None,
    where: str,
) -> Encoded:
    """Tokenize a prompt together with its target, as in :func:`encode_edit`.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        prompt: the text that the model reads before it answers, including the chat template if there is one.
        space: the text between prompt and target, for example a space. The model learns it as a part of the answer.
        target: the target of the edit.
        end: the id of the token that ends an answer. This token is appended, unless the target already ends with it.
            With None, no token is appended.
        encode: function ``encode(tokenizer, text)`` that returns the token ids of a text.
        max_length: the maximum number of tokens, or None.
        where: the beginning of every error message.

    Raises:
        EditError: for the same reasons as :func:`encode_edit`.
    """
    shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
    try:
        head = encode(tokenizer, prompt)
    except EditError as error:
        raise EditError(f"{where}{error}") from error
    answer = space + target
    ids = encode(tokenizer, prompt + answer)
    if ids[: len(head)] != head or len(ids) <= len(head):
        ids = head + encode_continuation(tokenizer, answer)
    if len(ids) == len(head):
        raise EditError(
            f"{where}the target {cut(repr(target), 100)} of the prompt {shown!r} has no tokens; change the target"
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in (end, tokenizer.eos_token_id) and unknown in ids[len(head) :]:
        raise EditError(
            f"{where}the target {cut(repr(target), 100)} of the prompt {shown!r} has characters that the "
            "tokenizer cannot encode, so no model with this tokenizer can generate the target; write the "
            "target with other characters"
        )
    if end is not None and ids[-1] != end:
        ids = [*ids, end]
    if max_length is not None and len(ids) > max_length:
        raise EditError(
            f"{where}the prompt {shown!r} and its target must have at most {max_length} tokens together, got "
            f"{len(ids)}; shorten the edit, leave it out, or split long documents with kedit_train.data.split_documents"
        )
    return Encoded(ids, len(head))


def pad_token_id(tokenizer: Any) -> int:
    """Return the id of the padding token. If the tokenizer has none, return the id of the end-of-text token.

    Raises:
        EditError: the tokenizer has neither of these tokens.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise EditError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")


def collate(encoded: Sequence[Encoded], *, pad_id: int, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Pad encoded edits to a batch for ``model(**batch)``.

    :class:`~kedit_train.data.EditCollator` is the public interface of this function.

    Args:
        encoded: the tokenized edits, [batch].
        pad_id: the id of the padding token, which may be the end-of-text token.
        padding_side: "right" or "left". Models with absolute positions (GPT-2) also need
            ``position_ids(batch["attention_mask"])`` for padding on the left.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each [batch, longest], int64. Labels are -100 outside of the
        target. An end-of-text token in the target keeps its label, even if ``pad_id`` is the same token.

    Raises:
        EditError: ``encoded`` is empty, or ``padding_side`` is unknown.
    """
    if padding_side not in ("right", "left"):
        raise EditError(f'padding_side must be "right" or "left", got {padding_side!r}.')
    if not encoded:
        raise EditError("a batch must contain at least one encoded edit, got none.")
    longest = max(len(example.input_ids) for example in encoded)
    batch = {
        "input_ids": torch.full((len(encoded), longest), pad_id),
        "attention_mask": torch.zeros((len(encoded), longest), dtype=torch.long),
        "labels": torch.full((len(encoded), longest), IGNORE_INDEX),
    }
    for i, example in enumerate(encoded):
        begin = longest - len(example.input_ids) if padding_side == "left" else 0
        end = begin + len(example.input_ids)
        batch["input_ids"][i, begin:end] = torch.tensor(example.input_ids)
        batch["attention_mask"][i, begin:end] = 1
        batch["labels"][i, begin + example.target_start : end] = torch.tensor(example.input_ids[example.target_start :])
    return batch


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token, [batch, length], for padding on the left or on the right.

    The first token that is not padding has position 0.
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def context_length(config: Any) -> int | None:
    """Return the context length of a model in tokens, or None if its configuration sets no limit.

    Recurrent models and models with ALiBi set no limit.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length"):
        length = getattr(text_config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None
