"""The names of the prompt formats, and ``ChatFormat``, which describes chats with a system prompt or earlier turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from kedit_train.arguments import Rule, check_arguments, cut, from_mapping, optional
from kedit_train.data.conversations import check_messages
from kedit_train.errors import EditError, reported_by
from kedit_train.safetensors_header import parse_json

FORMATS = ("plain", "chat", "question")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A prompt format for chats: the prompt is the user's last message, rendered with the tokenizer's chat template.

    You can pass a ``ChatFormat`` wherever kedit-train has an argument ``prompt_format``. ``ChatFormat()`` and "chat"
    are the same.

    Args:
        system: the system prompt. With None, the template may add its own default system prompt.
        history: list of earlier messages of the conversation, each with ``role`` and ``content``. They follow the
            system prompt, and are the same for all prompts.
        thinking: whether the model thinks before it answers. With True, the template gets ``enable_thinking=True``. In
            training, the thoughts are an empty block ``<think></think>``, which does not count in the loss. In an
            evaluation, the model generates its thoughts, and only the text after ``</think>`` is its answer. Thoughts
            need many tokens, so raise ``max_new_tokens`` of the evaluation. With False, ``enable_thinking`` is not
            passed to the template, so the template's default applies.

    Raises:
        EditError: an argument has the wrong type, or a message has no role or content.

    Example:
        >>> from kedit_train import ChatFormat
        >>> chat = ChatFormat(system="Answer with one word.")
        >>> [message["role"] for message in chat.messages("Who lives in Bern?", "Ada")]
        ['system', 'user', 'assistant']
    """

    system: str | None = None
    history: Sequence[Mapping[str, Any]] = ()
    thinking: bool = False

    def __post_init__(self) -> None:
        text = optional(Rule("text", lambda value: isinstance(value, str)))
        messages = Rule("a list of messages", lambda value: isinstance(value, Sequence) and not isinstance(value, str))
        check_arguments(
            self,
            system=(self.system, text),
            history=(self.history, messages),
            thinking=(self.thinking, Rule("True or False", lambda value: isinstance(value, bool))),
        )
        if self.history:
            with reported_by("ChatFormat"):
                check_messages(self.history, "history")
        object.__setattr__(self, "history", tuple(dict(message) for message in self.history))

    def messages(self, prompt: str, target: str | None = None) -> list[dict[str, Any]]:
        """Return the messages for the chat template.

        The last message is the user's prompt, or the answer if one is given.
        """
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        last = [] if target is None else [{"role": "assistant", "content": target}]
        return [*first, *(dict(message) for message in self.history), {"role": "user", "content": prompt}, *last]

    @property
    def template_arguments(self) -> dict[str, Any]:
        """The arguments of ``apply_chat_template`` that this format sets."""
        return {"enable_thinking": True} if self.thinking else {}


PromptFormat: TypeAlias = Literal["plain", "chat", "question"] | ChatFormat

PROMPT_FORMAT = Rule(
    '"plain", "chat", "question" or a ChatFormat',
    lambda value: isinstance(value, ChatFormat) or (isinstance(value, str) and value in FORMATS),
)


def chat_format(prompt_format: PromptFormat) -> ChatFormat | None:
    """Return ``prompt_format`` as a ``ChatFormat``, or None if it is not a format for chats."""
    if isinstance(prompt_format, ChatFormat):
        return prompt_format
    return ChatFormat() if prompt_format == "chat" else None


def thinks(prompt_format: PromptFormat) -> bool:
    """Return whether the model thinks before it answers in this prompt format."""
    chat = chat_format(prompt_format)
    return chat is not None and chat.thinking


def read_format(value: Any) -> Any:
    """Convert a mapping (from YAML) or a JSON object (from the command line) to a ``ChatFormat``.

    The keys are the arguments of ``ChatFormat``. Any other value, such as "plain", is returned unchanged.

    Raises:
        EditError: an argument is unknown or has the wrong type, or the JSON is malformed.
    """
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise EditError(f"prompt_format must be valid JSON, got {cut(repr(value), 80)} ({error}).") from error
    return from_mapping(ChatFormat, value) if isinstance(value, Mapping) else value


def describe_format(prompt_format: PromptFormat | None) -> str | dict[str, Any] | None:
    """Return a prompt format as JSON data, for reports."""
    if not isinstance(prompt_format, ChatFormat):
        return prompt_format
    return (
        "chat" if prompt_format == ChatFormat() else {**asdict(prompt_format), "history": list(prompt_format.history)}
    )


def check_format(prompt_format: Any, tokenizer: Any = None) -> None:
    """Raise an ``EditError`` for an unknown format, or for a chat with a tokenizer that has no chat template."""
    if not PROMPT_FORMAT.holds(prompt_format):
        raise EditError(f"prompt_format must be {PROMPT_FORMAT.expected}, got {cut(repr(prompt_format))}.")
    is_chat = chat_format(prompt_format) is not None
    if is_chat and tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise EditError(
            f"prompt_format={prompt_format!r} needs a chat template, but this tokenizer has none; set "
            'tokenizer.chat_template (--model.chat_template in a recipe), or set prompt_format to "plain" or "question"'
        )
