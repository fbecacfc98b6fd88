"""Edits as tokens: one joint tokenisation, a target mask by construction, batches that change nothing.

Published editors find the target by counting tokens that differ from padding; with pad = eos that drops the
end-of-text token or shifts the mask by one. Here the target's first position is carried along from the start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_train.errors import EditError
from kedit_train.functional.labels import IGNORE_INDEX

# Scripts written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, CJK punctuation, kana, Bopomofo,
# Han, full-width forms (Hangul is not among them: Korean puts spaces between words).
SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff00-\uff60\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Encoded:
    """One edit as tokens: ``input_ids[target_start:]`` is the target with its end-of-text token, if it has one."""

    input_ids: list[int]
    target_start: int


def shorten(text: str, width: int = 60) -> str:
    """``text`` on one line, for a message: at most ``width`` characters, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def separator(prompt: str, target: str) -> str:
    """What goes between prompt and target: a space, or nothing where one is there or the script has none.

    Nothing if the prompt ends in white space, if the target begins with it, or if either side of the border is
    written in a script without spaces between words (Chinese, Japanese, Thai, ...).
    """
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    return "" if SPACELESS.match(prompt[-1]) or SPACELESS.match(target[0]) else " "


def ids_of(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids, never padded or truncated, whatever the tokenizer's own settings say."""
    found = tokenizer(text, add_special_tokens=special, padding=False, truncation=False, verbose=False)
    return list(found["input_ids"])


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The ids that a model generates from: with begin-of-text where the tokenizer adds one, without end-of-text.

    A tokenizer that puts end-of-text after every text (``add_eos_token=True``) would close the prompt before the
    answer, so what it adds there is taken off; an end-of-text that is written in the prompt stays.

    Raises:
        EditError: the prompt is empty, or gives no token.
    """
    ids = ids_of(tokenizer, prompt, special=True)
    eos = tokenizer.eos_token_id
    if eos is not None and ids and ids[-1] == eos:
        written = trailing(ids_of(tokenizer, prompt, special=False), eos)
        ids = ids[: len(ids) - max(0, trailing(ids, eos) - written)]
    if not prompt or not ids:
        raise EditError(f"the prompt {prompt!r} gives no tokens: an edit needs a context to answer in")
    return ids


def trailing(ids: Sequence[int], token: int) -> int:
    count = 0
    while count < len(ids) and ids[-1 - count] == token:
        count += 1
    return count


def continuation(tokenizer: Any, text: str) -> list[int]:
    """The ids of ``text`` where it continues another text, without the space that some tokenizers put before a text.

    Metaspace tokenizers (Llama 2) turn a text into " text" first. Behind an anchor that does not merge with it, the
    text's own tokens are seen.
    """
    for anchor in ("\n", "?", "a"):
        head = ids_of(tokenizer, anchor, special=False)
        both = ids_of(tokenizer, anchor + text, special=False)
        if head and len(both) > len(head) and both[: len(head)] == head:
            return both[len(head) :]
    return ids_of(tokenizer, text, special=False)


def encode_edit(
    tokenizer: Any,
    prompt: str,
    target: str,
    *,
    append_eos: bool = True,
    max_length: int | None = None,
    where: str = "",
) -> Encoded:
    """Prompt and target as tokens, tokenised together once; the prompt's tokens are always ``encode_prompt``'s.

    Where a token straddles the border of prompt and target (the prompt ends in a space, or in half a word), the joint
    tokens do not begin with the prompt's own. The target is then tokenised as a continuation of its own, so that the
    model is trained in exactly the context that it will generate from.

    Args:
        tokenizer: of ``transformers``.
        prompt: as in ``Edit``.
        target: as in ``Edit``; ``separator`` decides on the space between them.
        append_eos: end the target with end-of-text, exactly once, so that the edited model learns to stop.
        max_length: the most tokens that fit, e.g. ``context_length(model.config)``. Nothing is ever truncated.
        where: names the edit in errors, e.g. ``"facts.json, edit 3 (id 17758)"``.

    Raises:
        EditError: too long; no end-of-text token to append; the target has no tokens, or characters that the
            tokenizer only knows as "unknown", which no model could ever generate.
    """
    named = f"{where}: " if where else ""
    if append_eos and tokenizer.eos_token_id is None:
        raise EditError(
            f"{named}the tokenizer has no end-of-text token to append: set tokenizer.eos_token, or pass "
            "append_eos=False"
        )
    end = tokenizer.eos_token_id if append_eos else None
    lead = separator(prompt, target)
    return joined(tokenizer, prompt, lead, target, end=end, encode=encode_prompt, max_length=max_length, where=named)


def joined(
    tokenizer: Any,
    prompt: str,
    lead: str,
    target: str,
    *,
    end: int | None,
    encode: Callable[[Any, str], list[int]],
    max_length: int | None,
    where: str,
) -> Encoded:
    """What ``encode_edit`` does, with its refusals, for any frame around the prompt.

    Args:
        lead: what separates prompt and target; it is trained with the target.
        end: the id that ends the answer, appended unless the answer ends in it; None appends nothing.
        encode: gives a text's ids, ``encode(tokenizer, text)``.
        where: what errors begin with.
    """
    shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
    try:
        head = encode(tokenizer, prompt)
    except EditError as error:
        raise EditError(f"{where}{error}") from error
    answer = lead + target
    ids = encode(tokenizer, prompt + answer)
    if ids[: len(head)] != head or len(ids) <= len(head):
        ids = head + continuation(tokenizer, answer)
    if len(ids) == len(head):
        raise EditError(f"{where}the target {target!r} of the prompt {shown!r} gives no tokens: change the target")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in (end, tokenizer.eos_token_id) and unknown in ids[len(head) :]:
        raise EditError(
            f"{where}the target {target!r} of the prompt {shown!r} has characters that the tokenizer does not know, "
            "so that no model with it can say them: spell the target otherwise"
        )
    if end is not None and ids[-1] != end:
        ids = [*ids, end]
    if max_length is not None and len(ids) > max_length:
        raise EditError(
            f"{where}the prompt {shown!r} and its target have {len(ids)} tokens, {max_length} fit: shorten the edit "
            "or leave it out"
        )
    return Encoded(ids, len(head))


def pad_token_id(tokenizer: Any) -> int:
    """The padding token's id, else end-of-text's: masks come from lengths, so any id would do.

    Raises:
        EditError: the tokenizer has neither.
    """
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return found
    raise EditError("the tokenizer has neither a padding nor an end-of-text token: set tokenizer.pad_token")


def collate(encoded: Sequence[Encoded], *, pad_id: int, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """A batch for ``model(**batch)``.

    Args:
        encoded: [batch] edits.
        pad_id: fills the gaps; it may be the id of end-of-text.
        padding_side: ``"right"`` or ``"left"``. Models with absolute positions (GPT-2) also need
            ``position_ids(batch["attention_mask"])`` where padding is on the left; rotary ones give the same without.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each [batch, longest], int64. Labels are -100 outside the
        target, by position and never by comparing ids with ``pad_id``.

    Raises:
        EditError: no edits, or an unknown side.
    """
    if padding_side not in ("right", "left"):
        raise EditError(f"padding_side={padding_side!r} is not known: use 'right' or 'left'")
    if not encoded:
        raise EditError("there is nothing to collate: give at least one encoded edit")
    longest = max(len(one.input_ids) for one in encoded)
    batch = {
        "input_ids": torch.full((len(encoded), longest), pad_id),
        "attention_mask": torch.zeros((len(encoded), longest), dtype=torch.long),
        "labels": torch.full((len(encoded), longest), IGNORE_INDEX),
    }
    for row, one in enumerate(encoded):
        begin = longest - len(one.input_ids) if padding_side == "left" else 0
        end = begin + len(one.input_ids)
        batch["input_ids"][row, begin:end] = torch.tensor(one.input_ids)
        batch["attention_mask"][row, begin:end] = 1
        batch["labels"][row, begin + one.target_start : end] = torch.tensor(one.input_ids[one.target_start :])
    return batch


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """[batch, length] positions that count from each row's first real token, whichever side is padded."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def context_length(config: Any) -> int | None:
    """The most tokens that a model's configuration allows, or None where it names no limit (recurrent, ALiBi)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None
