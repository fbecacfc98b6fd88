"""Prompt formats: a plain prompt, a prompt in a chat template, or a prompt framed as a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kedit_train.arguments import cut
from kedit_train.data.chat_format import (
    FORMATS,
    ChatFormat,
    PromptFormat,
    chat_format,
    check_format,
    thinks,
)
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

__all__ = ["FORMATS", "ChatFormat", "PromptFormat", "check_format"]

_QUESTION_MARKS = ("?", "？", "؟", "՞", ";")
# A placeholder that shows what a template puts around an answer. It has only letters, so no template escapes it.
_ANSWER = "kedittrainanswer"
# The tags that most thinking models put around their thoughts.
THINK, END_THINK = "<think>", "</think>"


def is_question(prompt: str) -> bool:
    """Return whether a prompt ends with a question mark. All other prompts are treated as incomplete sentences."""
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

    With ``prompt_format="question"``, all prompts of the training are framed as questions. For this format, the
    function always returns an incomplete sentence: it turns a question into an incomplete sentence, and returns any
    other prompt unchanged.
    """
    to_completion = prompt_format == "question" or is_question(prompt)
    return as_completion(prompt) if to_completion else as_question(prompt)


@dataclass(frozen=True)
class _Frame:
    """The text around an answer.

    Args:
        generation: the text from which the model generates.
        prompt: the text before the answer in training. It is equal to ``generation`` if the model does not think. If
            the model thinks before it answers, an empty thinking block is added after ``generation``.
        space: the spaces in front of the answer. None means that :func:`separator` decides.
        after: the text that the template puts after the answer.
    """

    generation: str
    prompt: str
    space: str | None = None
    after: str = ""


def render_prompt(tokenizer: Any, prompt: str, prompt_format: PromptFormat) -> str:
    """Return the text from which the model generates.

    In a chat, this text ends where the answer of the assistant begins. Text that the template puts before every answer,
    such as an empty thinking block, is part of the prompt. If the model thinks before it answers, the text ends where
    the thoughts begin.
    """
    return _frame(tokenizer, prompt, prompt_format).generation


def _frame(tokenizer: Any, prompt: str, prompt_format: PromptFormat) -> _Frame:
    chat = chat_format(prompt_format)
    if chat is None:
        text = as_question(prompt) if prompt_format == "question" else prompt
        return _Frame(text, text)
    options = {"tokenize": False, **chat.template_arguments}
    text = str(tokenizer.apply_chat_template(chat.messages(prompt), add_generation_prompt=True, **options))
    whole = str(tokenizer.apply_chat_template(chat.messages(prompt, _ANSWER), **options))
    before, placeholder, after = whole.rpartition(_ANSWER)
    space = None
    if not placeholder or not before.startswith(text):
        read, after = text, after if chat.thinking else ""
    else:
        # The spaces belong to the answer, because most tokenizers join a space with the word after it.
        read = text + before[len(text) :].rstrip(" ")
        space = before[len(read) :]
    if not chat.thinking:
        return _Frame(read, read, space, after)
    if END_THINK not in read[len(text) :]:
        # Some templates open the block of thoughts, but write no block for an answer without thoughts.
        opened = text if text.rstrip().endswith(THINK) else f"{text}{THINK}\n"
        read, space = opened + ("\n" if opened.endswith("\n") else "\n\n") + f"{END_THINK}\n\n", ""
    return _Frame(text, read, space, after)


def prompt_ids(tokenizer: Any, prompt: str, prompt_format: PromptFormat = "plain") -> list[int]:
    """Return the token ids of the text from which the model generates its answer.

    In a chat, the template contains the special tokens, so the tokenizer adds none.
    """
    text = render_prompt(tokenizer, prompt, prompt_format)
    return encode_prompt(tokenizer, text) if chat_format(prompt_format) is None else _without_special(tokenizer, text)


def _without_special(tokenizer: Any, text: str) -> list[int]:
    return token_ids(tokenizer, text, special=False)


def end_id(tokenizer: Any, prompt_format: PromptFormat = "plain") -> int | None:
    """Return the id of the token that ends an answer.

    Returns:
        The id of the end-of-text token, or None if the tokenizer has no such token. In a chat, the template may put
        special tokens after an answer. The result is then the id of the first of these special tokens, which closes
        the turn of the assistant.
    """
    if chat_format(prompt_format) is None:
        return tokenizer.eos_token_id
    return _closing_id(tokenizer, _frame(tokenizer, _ANSWER.upper(), prompt_format).after)


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

    The tokens of the prompt are those of :func:`prompt_ids`, so training and generation use the same tokens. If the
    model thinks before it answers, an empty thinking block is put between the prompt and the target.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        prompt: the prompt of an edit.
        target: the target of the edit.
        prompt_format: "plain", "chat", "question" or a ``ChatFormat``.
        append_eos: end the target with exactly one token that ends an answer (:func:`end_id`).
        max_length: the maximum number of tokens. None sets no limit.
        where: the name of the edit in error messages.

    Raises:
        EditError: for the same reasons as :func:`~kedit_train.data.tokenization.encode_edit`.
    """
    frame = _frame(tokenizer, prompt, prompt_format)
    rest: dict[str, Any] = {"max_length": max_length}
    if chat_format(prompt_format) is None:
        return encode_edit(tokenizer, frame.prompt, target, append_eos=append_eos, where=where, **rest)
    named, end = f"{where}: " if where else "", _closing_id(tokenizer, frame.after)
    if thinks(prompt_format) and END_THINK in target:
        raise EditError(
            f"{named}with thinking=True, the target must be the answer after the thoughts, got "
            f"{cut(repr(target), 100)}; remove everything up to {END_THINK} from the target"
        )
    if append_eos and end is None:
        raise EditError(
            f"{named}append_eos=True needs a token that ends a turn, but neither the chat template nor the tokenizer "
            "has one; set tokenizer.eos_token, or pass append_eos=False"
        )
    space = separator(frame.prompt, target) if frame.space is None else frame.space
    end = end if append_eos else None
    return encode_pair(tokenizer, frame.prompt, space, target, end=end, encode=_without_special, where=named, **rest)


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
            f"the target {cut(repr(target), 100)} of the prompt {shorten(prompt)!r} must contain text, got only an "
            "end-of-text token; change the target"
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
        prompt_format: "plain", "chat", "question" or a ``ChatFormat``.

    Raises:
        EditError: a prompt has no tokens, or fills the whole context of the model.
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
