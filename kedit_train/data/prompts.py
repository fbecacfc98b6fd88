"""Prompt formats: a plain prompt, a prompt in a chat template, or a prompt framed as a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kedit_train.data.tokenization import (
    Encoded,
    encode_edit,
    encode_pair,
    encode_prompt,
    separator,
    shorten,
    token_ids,
)
from kedit_train.errors import EditError

PromptFormat = Literal["plain", "chat", "question"]
FORMATS = ("plain", "chat", "question")

_QUESTION_MARKS = ("?", "？", "؟", "՞", ";")
# A placeholder that shows what a template puts around an answer. It has only letters, so no template escapes it.
_ANSWER = "kedittrainanswer"


def is_question(prompt: str) -> bool:
    """Return whether a prompt is a question. Any other prompt is an incomplete sentence."""
    return prompt.rstrip().endswith(_QUESTION_MARKS)


def as_question(prompt: str) -> str:
    """Frame a prompt as a question. If the prompt is an incomplete sentence, the question asks how it ends."""
    question = prompt.strip() if is_question(prompt) else f'How does this sentence end? "{prompt.strip()} ..."'
    return f"Please answer the question.\nQ: {question}\nA:"


def as_completion(prompt: str) -> str:
    """Turn a question into an incomplete sentence. Any other prompt is returned unchanged."""
    return f'The answer to the question "{prompt.strip()}" is' if is_question(prompt) else prompt


def switch_format(prompt: str, prompt_format: PromptFormat) -> str:
    """Turn an incomplete sentence into a question, and a question into an incomplete sentence.

    With ``prompt_format="question"``, the model reads every prompt as a question, so the result is always an incomplete
    sentence.
    """
    to_completion = prompt_format == "question" or is_question(prompt)
    return as_completion(prompt) if to_completion else as_question(prompt)


def check_format(prompt_format: str, tokenizer: Any = None) -> None:
    """Raise an ``EditError`` for an unknown format, or for "chat" with a tokenizer that has no chat template."""
    if prompt_format not in FORMATS:
        raise EditError(f'prompt_format must be "plain", "chat" or "question", got {prompt_format!r}.')
    if prompt_format == "chat" and tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise EditError(
            'prompt_format="chat" needs a chat template, and this tokenizer has none; set tokenizer.chat_template '
            '(--model.chat_template in a recipe), or use "plain" or "question"'
        )


def chat_messages(prompt: str, target: str | None = None) -> list[dict[str, str]]:
    """Return a prompt, with its target if one is given, as messages for a chat template."""
    messages = [{"role": "user", "content": prompt}]
    return messages if target is None else [*messages, {"role": "assistant", "content": target}]


def render_prompt(tokenizer: Any, prompt: str, prompt_format: PromptFormat) -> str:
    """Return the text that the model reads before it answers.

    In a chat, this text ends where the answer of the assistant begins. Text that the template puts before every answer,
    such as an empty thinking block, is part of the prompt.
    """
    return _split_template(tokenizer, prompt, prompt_format)[0]


def _split_template(tokenizer: Any, prompt: str, prompt_format: PromptFormat) -> tuple[str, str | None, str]:
    """Return the text before the answer, the spaces in front of the answer, and the text after the answer.

    The spaces are None if no template sets them. They then depend on prompt and target (:func:`separator`).
    """
    if prompt_format == "question":
        return as_question(prompt), None, ""
    if prompt_format == "plain":
        return prompt, None, ""
    text = str(tokenizer.apply_chat_template(chat_messages(prompt), tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(chat_messages(prompt, _ANSWER), tokenize=False))
    before, placeholder, after = whole.rpartition(_ANSWER)
    if not placeholder or not before.startswith(text):
        return text, None, ""
    # The spaces belong to the answer, because most tokenizers join a space with the word after it.
    read = text + before[len(text) :].rstrip(" ")
    return read, before[len(read) :], after


def prompt_ids(tokenizer: Any, prompt: str, prompt_format: PromptFormat = "plain") -> list[int]:
    """Return the token ids of the text from which the model generates its answer.

    In a chat, the template contains the special tokens, so the tokenizer adds none.
    """
    text = render_prompt(tokenizer, prompt, prompt_format)
    return _without_special(tokenizer, text) if prompt_format == "chat" else encode_prompt(tokenizer, text)


def _without_special(tokenizer: Any, text: str) -> list[int]:
    return token_ids(tokenizer, text, special=False)


def end_id(tokenizer: Any, prompt_format: PromptFormat = "plain") -> int | None:
    """Return the id of the token that ends an answer.

    Returns:
        The id of the end-of-text token, or None if the tokenizer has no such token. In a chat, the template may put
        special tokens after an answer. The result is then the id of the first of these special tokens, which closes
        the turn of the assistant.
    """
    if prompt_format != "chat":
        return tokenizer.eos_token_id
    return _closing_id(tokenizer, _split_template(tokenizer, _ANSWER.upper(), prompt_format)[2])


def _closing_id(tokenizer: Any, after: str) -> int | None:
    special = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return next((at for at in _without_special(tokenizer, after) if at in special), tokenizer.eos_token_id)


def encode_in_format(
    tokenizer: Any,
    prompt: str,
    target: str,
    prompt_format: PromptFormat = "plain",
    *,
    append_eos: bool = True,
    max_length: int | None = None,
    where: str = "",
) -> Encoded:
    """Tokenize a prompt and its target in one of the prompt formats.

    The tokens of the prompt are those of :func:`prompt_ids`, so training and generation use the same tokens.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        prompt: the prompt of an edit.
        target: the target of the edit.
        prompt_format: "plain", "chat" or "question".
        append_eos: end the target with exactly one token that ends an answer (:func:`end_id`).
        max_length: the maximum number of tokens. None sets no limit.
        where: the name of the edit in error messages.

    Raises:
        EditError: for the same reasons as :func:`~kedit_train.data.tokenization.encode_edit`.
    """
    text, lead, after = _split_template(tokenizer, prompt, prompt_format)
    rest: dict[str, Any] = {"max_length": max_length}
    if prompt_format != "chat":
        return encode_edit(tokenizer, text, target, append_eos=append_eos, where=where, **rest)
    named, end = f"{where}: " if where else "", _closing_id(tokenizer, after)
    if append_eos and end is None:
        raise EditError(
            f"{named}append_eos=True needs a token that ends a turn, but neither the chat template nor the tokenizer "
            "has one; set tokenizer.eos_token, or pass append_eos=False"
        )
    lead = separator(text, target) if lead is None else lead
    return encode_pair(
        tokenizer, text, lead, target, end=end if append_eos else None, encode=_without_special, where=named, **rest
    )


def pair_ids(
    tokenizer: Any, prompt: str, target: str, prompt_format: PromptFormat = "plain", max_length: int | None = None
) -> Encoded:
    """Tokenize a prompt and an answer, and append the token that ends an answer (:func:`end_id`) if one exists.

    Raises:
        EditError: the target has no tokens, or prompt and target have more than ``max_length`` tokens together.
    """
    ends = end_id(tokenizer, prompt_format) is not None
    encoded = encode_in_format(tokenizer, prompt, target, prompt_format, append_eos=ends, max_length=max_length)
    if len(encoded.input_ids) - encoded.target_start - ends < 1:
        raise EditError(
            f"the target {shorten(target)!r} of the prompt {shorten(prompt)!r} must contain text, got only an end-of-text "
            "token; change the target"
        )
    return encoded


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], context: int | None, prompt_format: PromptFormat = "plain"
) -> list[tuple[int, ...]]:
    """Return the token ids of every prompt.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        prompts: the prompts.
        context: the context length of the model in tokens, or None for no limit.
        prompt_format: "plain", "chat" or "question".

    Raises:
        EditError: a prompt is empty, or fills the whole context of the model.
    """
    sequences = []
    for prompt in prompts:
        ids = tuple(prompt_ids(tokenizer, prompt, prompt_format))
        if context is not None and len(ids) >= context:
            raise EditError(
                f"the prompt {shorten(prompt)!r} must have fewer tokens than the context of the model ({context}), got "
                f"{len(ids)}; shorten the prompt or leave it out"
            )
        sequences.append(ids)
    return sequences
