"""Convert edits to the rows of a ``datasets.Dataset``, for trainers that need such a dataset."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kedit_train.data.chat_format import ChatFormat, PromptFormat, chat_format, check_format
from kedit_train.data.fact_in_context import fact_sentence
from kedit_train.data.prompts import as_question
from kedit_train.data.tokenization import Encoded, separator
from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.functional.labels import IGNORE_INDEX
from kedit_train.optional import require

if TYPE_CHECKING:
    import datasets


class TrainerDatasets(Sequence[Edit]):
    """The methods of ``EditDataset`` that convert the edits to a ``datasets.Dataset``."""

    @abstractmethod
    def encode(self, tokenizer: Any, **options: Any) -> list[Encoded]: ...

    @abstractmethod
    def check_trained_together(self) -> None: ...

    def to_prompt_completion(self, *, prompt_format: PromptFormat = "plain") -> datasets.Dataset:
        """Convert the edits to a dataset with the columns ``prompt`` and ``completion``, for TRL's ``SFTTrainer``.

        The dataset contains prompts and targets, but no rephrases and no probes. In plain text, the completion begins
        with a space if prompt and target need a space between them. In a chat, both columns contain messages, which
        ``SFTTrainer`` renders with the chat template of its tokenizer.

        ``SFTTrainer`` (trl 1.16) appends end-of-text to every plain completion, even if the unedited model never writes
        end-of-text after a completion. To avoid this, use :meth:`to_tokens`. Its argument ``append_eos`` sets whether
        end-of-text is appended. ``docs/data.md`` lists all differences between the tokens of ``SFTTrainer`` and those
        of :meth:`encode`.

        Args:
            prompt_format: "plain", "chat", "question" or a ``ChatFormat`` with ``thinking=False``.

        Returns:
            One row per edit.

        Raises:
            EditError: the package ``datasets`` is not installed, two edits contradict each other, or the format is a
                ``ChatFormat`` with ``thinking=True``. ``SFTTrainer`` would train on the thinking block of this format.
        """
        check_format(prompt_format)
        self.check_trained_together()
        return to_dataset(prompt_completion_rows(self, prompt_format))

    def to_privileged_context(self, *, prompt_format: PromptFormat = "plain") -> datasets.Dataset:
        """Convert the edits to a dataset with the columns ``prompt`` and ``privileged_context``, for ``SDFTTrainer``.

        ``privileged_context`` is a sentence that states the new fact. In the training, only the teacher reads this
        sentence, and the trained model learns the predictions of the teacher.

        By default, TRL's ``SDFTTrainer`` puts the sentence after the prompt. A plain prompt is an incomplete sentence,
        so the new fact must come before it. For plain prompts, set
        ``teacher_prompt_template="{privileged_context} {prompt}"`` in ``SDFTConfig``.

        ``DistillationTrainer`` reads only the column ``prompt``. ``GRPOTrainer`` and ``RLOOTrainer`` generate from
        ``prompt`` and pass all columns to the reward functions.

        Args:
            prompt_format: "plain", "chat", "question" or a ``ChatFormat`` with ``thinking=False``. In a chat, the
                column ``prompt`` contains messages.

        Returns:
            One row per edit.

        Raises:
            EditError: the package ``datasets`` is not installed, two edits contradict each other, or the format is a
                ``ChatFormat`` with ``thinking=True``.

        References:
            "Self-Distillation Enables Continual Learning", arXiv 2601.19897.

        Example:
            >>> from kedit_train import EditDataset
            >>> EditDataset([Edit("Ada lives in", "Bern")]).to_privileged_context()[0]
            {'prompt': 'Ada lives in', 'privileged_context': 'Ada lives in Bern.'}
        """
        check_format(prompt_format)
        self.check_trained_together()
        return to_dataset(privileged_context_rows(self, prompt_format))

    def to_tokens(self, tokenizer: Any, **options: Any) -> datasets.Dataset:
        """Convert the edits to a dataset with the columns ``input_ids`` and ``labels``, for TRL and ``transformers``.

        TRL's ``SFTTrainer`` trains on these tokens as they are, and appends nothing.

        Args:
            tokenizer: a tokenizer of ``transformers``.
            options: the other arguments of :meth:`encode`.

        Returns:
            One row per edit. Labels are -100 outside of the target.

        Raises:
            EditError: the package ``datasets`` is not installed, or an edit cannot be tokenized (see :meth:`encode`).

        Example:
            >>> from kedit_train import EditDataset, world
            >>> model, tokenizer = world.load()
            >>> EditDataset.load("world", limit=2).to_tokens(tokenizer, model=model).column_names
            ['input_ids', 'labels']
        """
        return to_dataset(token_rows(self.encode(tokenizer, **options)))


def prompt_completion_rows(edits: Iterable[Edit], prompt_format: PromptFormat) -> list[dict[str, Any]]:
    """Return rows with the columns ``prompt`` and ``completion``.

    Raises:
        EditError: the format is a ``ChatFormat`` with ``thinking=True``.
    """
    chat = _chat_without_thinking(
        prompt_format,
        "SFTTrainer would train on the thinking block; use to_tokens(tokenizer, prompt_format=...), which leaves the "
        "block out of the loss",
    )
    rows: list[dict[str, Any]] = []
    for edit in edits:
        if chat is not None:
            *prompt, answer = chat.messages(edit.prompt, edit.target)
            rows.append({"prompt": prompt, "completion": [answer]})
            continue
        text = _plain_prompt(edit, prompt_format)
        rows.append({"prompt": text, "completion": separator(text, edit.target) + edit.target})
    return rows


def privileged_context_rows(edits: Iterable[Edit], prompt_format: PromptFormat) -> list[dict[str, Any]]:
    """Return rows with the columns ``prompt`` and ``privileged_context``.

    Raises:
        EditError: the format is a ``ChatFormat`` with ``thinking=True``.
    """
    chat = _chat_without_thinking(
        prompt_format,
        'the trainer applies the chat template itself; set chat_template_kwargs={"enable_thinking": True} in its '
        "config instead",
    )
    return [
        {
            "prompt": _plain_prompt(edit, prompt_format) if chat is None else chat.messages(edit.prompt),
            "privileged_context": fact_sentence(edit),
        }
        for edit in edits
    ]


def _chat_without_thinking(prompt_format: PromptFormat, reason: str) -> ChatFormat | None:
    """Return the chat format, or None for plain text. Raise an error with ``reason`` if thinking is on."""
    chat = chat_format(prompt_format)
    if chat is not None and chat.thinking:
        raise EditError(f"prompt_format must have thinking=False, because {reason}")
    return chat


def _plain_prompt(edit: Edit, prompt_format: PromptFormat) -> str:
    return as_question(edit.prompt) if prompt_format == "question" else edit.prompt


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
