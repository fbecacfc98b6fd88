"""In which form a question reaches the model: as it stands, through its chat template, or framed as a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kedit_train.data.tokenization import Encoded, encode_edit, encode_prompt, ids_of, joined, separator, shorten
from kedit_train.errors import EditError

PromptFormat = Literal["plain", "chat", "question"]
FORMATS = ("plain", "chat", "question")

_QUESTION_MARKS = ("?", "？", "؟", "՞", ";")
# Stands for an answer while the template is asked what it puts around one: letters only, so that none is escaped.
_ANSWER = "kedittrainanswer"


def is_question(prompt: str) -> bool:
    """Whether a prompt asks; any other is a sentence to be completed."""
    return prompt.rstrip().endswith(_QUESTION_MARKS)


def as_question(prompt: str) -> str:
    """A prompt in a question's frame; a sentence to be completed is asked for its end."""
    asked = prompt.strip() if is_question(prompt) else f'How does this sentence end? "{prompt.strip()} ..."'
    return f"Please answer the question.\nQ: {asked}\nA:"


def as_completion(prompt: str) -> str:
    """A prompt as a sentence to be completed; it stays as it is where it is one."""
    return f'The answer to the question "{prompt.strip()}" is' if is_question(prompt) else prompt


def switched(prompt: str, prompt_format: PromptFormat) -> str:
    """The same prompt in the other form: a completion as a question, a question as a completion."""
    to_completion = prompt_format == "question" or is_question(prompt)
    return as_completion(prompt) if to_completion else as_question(prompt)


def check_format(prompt_format: str, tokenizer: Any = None) -> None:
    """Refuse a form that is not known, or that this tokenizer (where one is given) cannot give."""
    if prompt_format not in FORMATS:
        raise EditError(f'prompt_format must be "plain", "chat" or "question", got {prompt_format!r}.')
    if prompt_format == "chat" and tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise EditError(
            "prompt_format='chat' needs a chat template and this tokenizer has none: set tokenizer.chat_template "
            "(--model.chat_template in a recipe), or use 'plain' or 'question'"
        )


def turns(prompt: str, target: str | None = None) -> list[dict[str, str]]:
    """The conversation of an edit, as a chat template reads it."""
    said = [{"role": "user", "content": prompt}]
    return said if target is None else [*said, {"role": "assistant", "content": target}]


def rendered(tokenizer: Any, prompt: str, prompt_format: PromptFormat) -> str:
    """What the model reads, as text; in a chat it ends where the assistant's answer begins.

    What the template itself puts before every answer (an empty train of thought) belongs to what is read.
    """
    return _framed(tokenizer, prompt, prompt_format)[0]


def _framed(tokenizer: Any, prompt: str, prompt_format: PromptFormat) -> tuple[str, str | None, str]:
    """What the model reads; the blanks between that and the answer, None where the texts decide; what closes a turn."""
    if prompt_format == "question":
        return as_question(prompt), None, ""
    if prompt_format == "plain":
        return prompt, None, ""
    text = str(tokenizer.apply_chat_template(turns(prompt), tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(turns(prompt, _ANSWER), tokenize=False))
    before, found, after = whole.rpartition(_ANSWER)
    if not found or not before.startswith(text):
        return text, None, ""
    # Blanks go with the answer: most tokenizers join a space with the word behind it.
    read = text + before[len(text) :].rstrip(" ")
    return read, before[len(read) :], after


def prompt_ids(tokenizer: Any, prompt: str, prompt_format: PromptFormat = "plain") -> list[int]:
    """The ids that the model generates from. A chat template brings its own special tokens, so none are added to it."""
    text = rendered(tokenizer, prompt, prompt_format)
    return _bare(tokenizer, text) if prompt_format == "chat" else encode_prompt(tokenizer, text)


def _bare(tokenizer: Any, text: str) -> list[int]:
    return ids_of(tokenizer, text, special=False)


def end_id(tokenizer: Any, prompt_format: PromptFormat = "plain") -> int | None:
    """The one token that ends an answer: end-of-text, in a chat the special token that closes the assistant's turn.

    Returns:
        In a chat, the first special token that the template puts after an answer (text around it, such as a line
        break, is not part of it); end-of-text where it puts none. None where the tokenizer has none either.
    """
    if prompt_format != "chat":
        return tokenizer.eos_token_id
    return _closing(tokenizer, _framed(tokenizer, _ANSWER.upper(), prompt_format)[2])


def _closing(tokenizer: Any, after: str) -> int | None:
    special = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return next((at for at in _bare(tokenizer, after) if at in special), tokenizer.eos_token_id)


def encode_in(
    tokenizer: Any,
    prompt: str,
    target: str,
    prompt_format: PromptFormat = "plain",
    *,
    append_eos: bool = True,
    max_length: int | None = None,
    where: str = "",
) -> Encoded:
    """``encode_edit`` in any form; the prompt's ids are ``prompt_ids``, those that the model will generate from.

    Args:
        append_eos: end the target with ``end_id``, exactly once.
    """
    text, lead, after = _framed(tokenizer, prompt, prompt_format)
    rest: dict[str, Any] = {"max_length": max_length}
    if prompt_format != "chat":
        return encode_edit(tokenizer, text, target, append_eos=append_eos, where=where, **rest)
    named, end = f"{where}: " if where else "", _closing(tokenizer, after)
    if append_eos and end is None:
        raise EditError(
            f"{named}neither the chat template nor the tokenizer has a token that ends a turn: set tokenizer.eos_token"
        )
    lead = separator(text, target) if lead is None else lead
    return joined(tokenizer, text, lead, target, end=end if append_eos else None, encode=_bare, where=named, **rest)


def pair_ids(
    tokenizer: Any, prompt: str, target: str, prompt_format: PromptFormat = "plain", max_length: int | None = None
) -> Encoded:
    """A prompt with an answer and the token that ends it (``end_id``, where there is one).

    Raises:
        EditError: a target without a token, or a pair longer than ``max_length``.
    """
    ends = end_id(tokenizer, prompt_format) is not None
    row = encode_in(tokenizer, prompt, target, prompt_format, append_eos=ends, max_length=max_length)
    if len(row.input_ids) - row.target_start - ends < 1:
        raise EditError(f"the target {target!r} of {shorten(prompt)!r} is only an end-of-text: give it some text")
    return row


def prompt_rows(
    tokenizer: Any, prompts: Sequence[str], context: int | None, prompt_format: PromptFormat = "plain"
) -> list[tuple[int, ...]]:
    """Every prompt's ids.

    Raises:
        EditError: a prompt is empty, or fills the model's whole context.
    """
    rows = []
    for prompt in prompts:
        ids = tuple(prompt_ids(tokenizer, prompt, prompt_format))
        if context is not None and len(ids) >= context:
            raise EditError(
                f"prompt {shorten(prompt)!r} has {len(ids)} tokens and the model's context is {context}: "
                "nothing can be generated after it; shorten it or leave it out"
            )
        rows.append(ids)
    return rows
