"""Conversations as texts: lists of messages, rendered with the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kedit_train.data.tokenization import shorten, token_ids
from kedit_train.errors import EditError


class RenderedConversation(str):
    """A conversation as text. The text contains the special tokens of the chat template.

    Attributes:
        contents: the contents of the messages. A template may change a content (for example, remove white space), so
            leak checks also read the contents.
    """

    contents: str

    def __new__(cls, text: str, contents: str) -> RenderedConversation:
        rendered = super().__new__(cls, text)
        rendered.contents = contents
        return rendered


def check_messages(messages: Any, where: str) -> None:
    """Raise an error if ``messages`` is not a list of messages with a role and a content.

    Args:
        messages: a list of dicts with the keys ``role`` and ``content``, as for ``apply_chat_template``.
        where: the beginning of the error message.

    Raises:
        EditError: a message is malformed, or there is no message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise EditError(
            f"{where}: messages must be a list of at least one message with a role and a content, got "
            f"{shorten(repr(messages))}; correct the list."
        )
    for number, message in enumerate(messages, 1):
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else []
        if not fields or not all(isinstance(value, str) for value in fields):
            raise EditError(
                f'{where}, message {number}: expected {{"role": TEXT, "content": TEXT}}, got '
                f"{shorten(repr(message))}; correct this message."
            )


def render_conversation(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str) -> RenderedConversation:
    """Return a conversation as text, rendered with the chat template of the tokenizer.

    Args:
        tokenizer: a tokenizer of ``transformers`` with a chat template.
        messages: the messages, each with ``role`` and ``content``.
        where: the beginning of every error message.

    Raises:
        EditError: the tokenizer has no chat template, or the template does not accept the messages.

    Example:
        >>> from kedit_train import world
        >>> _, tokenizer = world.load()
        >>> tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        >>> str(render_conversation(tokenizer, [{"role": "user", "content": "Hello"}], "texts"))
        '[user] Hello '
    """
    if not getattr(tokenizer, "chat_template", None):
        raise EditError(
            f"{where} is a conversation and needs a chat template, but this tokenizer has none; set "
            'tokenizer.chat_template (--model.chat_template in a recipe), or use records with "text".'
        )
    import jinja2

    try:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EditError(
            f"{where}: the chat template does not accept the messages ({reason}); correct the messages."
        ) from error
    return RenderedConversation(str(text), "\n".join(message["content"] for message in messages))


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text.

    A rendered conversation already contains its special tokens, so no special tokens are added to it.
    """
    if not any(isinstance(text, RenderedConversation) for text in texts):
        return list(tokenizer(list(texts), truncation=False)["input_ids"])
    return [token_ids(tokenizer, text, special=not isinstance(text, RenderedConversation)) for text in texts]
