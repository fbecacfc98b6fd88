"""In which form a question reaches the model: as it stands, through its chat template, or framed as a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kedit_train.data.tokenise import Encoded, continuation, encode_edit, encode_prompt, ids_of, separator
from kedit_train.errors import EditError
from kedit_train.evaluation.batching import shorten

PromptFormat = Literal["plain", "chat", "question"]
FORMATS = ("plain", "chat", "question")

_QUESTION_MARKS = ("?", "？", "؟", "՞", ";")


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


def check_format(prompt_format: str, tokenizer: Any) -> None:
    """Refuse a form that is not known, or that this tokenizer cannot give."""
    if prompt_format not in FORMATS:
        raise EditError(f"prompt_format={prompt_format!r} is not known: use 'plain', 'chat' or 'question'")
    if prompt_format == "chat" and not getattr(tokenizer, "chat_template", None):
        raise EditError(
            "prompt_format='chat' needs a chat template and this tokenizer has none: set tokenizer.chat_template, or "
            "use 'plain' or 'question'"
        )


def rendered(tokenizer: Any, prompt: str, prompt_format: PromptFormat) -> str:
    """What the model reads, as text; in a chat it ends where the assistant's turn begins."""
    if prompt_format == "question":
        return as_question(prompt)
    if prompt_format == "chat":
        turns = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return prompt


def prompt_ids(tokenizer: Any, prompt: str, prompt_format: PromptFormat = "plain") -> list[int]:
    """The ids that the model generates from. A chat template brings its own special tokens, so none are added to it."""
    text = rendered(tokenizer, prompt, prompt_format)
    return ids_of(tokenizer, text, special=False) if prompt_format == "chat" else encode_prompt(tokenizer, text)


def pair_ids(
    tokenizer: Any, prompt: str, target: str, prompt_format: PromptFormat = "plain", max_length: int | None = None
) -> Encoded:
    """A prompt with an answer and its end-of-text (where the tokenizer has one); the prompt's ids are ``prompt_ids``.

    Raises:
        EditError: a target without a token, or a pair longer than ``max_length``.
    """
    ends = tokenizer.eos_token_id is not None
    text = rendered(tokenizer, prompt, prompt_format)
    if prompt_format == "chat":
        row = _chat_pair(tokenizer, text, target, ends)
        if max_length is not None and len(row.input_ids) > max_length:
            raise EditError(
                f"the prompt {shorten(prompt)!r} and its target have {len(row.input_ids)} tokens in the chat "
                f"template, {max_length} fit: shorten the edit or leave it out"
            )
    else:
        row = encode_edit(tokenizer, text, target, append_eos=ends, max_length=max_length)
    if len(row.input_ids) - row.target_start - ends < 1:
        raise EditError(f"the target {target!r} of {shorten(prompt)!r} is only an end-of-text: give it some text")
    return row


def _chat_pair(tokenizer: Any, text: str, target: str, ends: bool) -> Encoded:
    head = ids_of(tokenizer, text, special=False)
    answer = separator(text, target) + target
    ids = ids_of(tokenizer, text + answer, special=False)
    if ids[: len(head)] != head or len(ids) <= len(head):
        ids = head + continuation(tokenizer, answer)
    return Encoded([*ids, tokenizer.eos_token_id] if ends and ids[-1] != tokenizer.eos_token_id else ids, len(head))


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
