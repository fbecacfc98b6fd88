"""Detect the prompt format of the training examples of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kedit_train.core.run import EditRun
from kedit_train.data.chat_format import PROMPT_FORMAT, PromptFormat, chat_format, read_format
from kedit_train.data.prompts import as_question, render_prompt
from kedit_train.data.visible import without_spaces
from kedit_train.edit import Edit
from kedit_train.errors import warn

# Number of training examples that are read to detect their format.
EXAMPLES = 8
_PLACEHOLDER = "kedittrainquestion"


def training_format(run: EditRun, tokenizer: Any, edits: Sequence[Edit] = ()) -> PromptFormat | None:
    """Return the prompt format of the training examples, or None if it is unknown.

    The result depends on the training loop:

    - Plain loop: the argument ``prompt_format`` of ``editing``.
    - Lightning: the attribute ``prompt_format`` of the data module, for example of ``EditDataModule``.
    - ``EditSFTTrainer``: ``prompt_format`` in the trainer's arguments.
    - Other trainers of ``transformers`` and TRL: the format that the first training examples show.

    Args:
        run: the run. The training data must be available, so call this function in ``attach`` or later.
        tokenizer: the tokenizer that the examples were tokenized with.
        edits: the edits. Their prompts are needed to detect the format "question".
    """
    for owner in (run.host, *owners_of_examples(run.host)):
        declared = read_format(getattr(owner, "prompt_format", None))
        if declared is not None and PROMPT_FORMAT.holds(declared):
            return declared
    examples = first_examples(run.host)
    if any(map(_is_conversation, examples)):
        return "chat"
    texts = [without_spaces(text) for example in examples if (text := _text_of(example, tokenizer))]
    if not texts:
        return None
    if any(map(is_chat(tokenizer), texts)):
        return "chat"
    # The format is "question" if an example contains the prompt of an edit, written as a question.
    questions = (without_spaces(as_question(edit.prompt)) for edit in edits[:1000])
    return "question" if any(question in text for question in questions for text in texts) else "plain"


def resolve_format(run: EditRun, tokenizer: Any, edits: Sequence[Edit]) -> PromptFormat:
    """Return the prompt format for the evaluation: the format of the training examples, or "plain".

    "plain" is returned if the format of the training examples is unknown. It is also returned if the training examples
    are chats and the tokenizer has no chat template.

    A warning is issued in three cases:

    - The format is unknown, but the tokenizer has a chat template. The training examples may then be chats.
    - The training examples are chats, but the tokenizer has no chat template.
    - The training chats begin with messages that the evaluation prompts do not have, such as a system prompt.
    """
    found = training_format(run, tokenizer, edits)
    if found is not None and chat_format(found) is not None and not getattr(tokenizer, "chat_template", None):
        warn(
            "the training examples are chats, but the evaluation uses plain prompts, because the tokenizer has no "
            "chat template; set tokenizer.chat_template to the template of the training examples."
        )
        return "plain"
    if found is None and getattr(tokenizer, "chat_template", None):
        warn(
            "the evaluation uses plain prompts, because it is unknown whether the training examples of this "
            f"{run.host.name} run use the tokenizer's chat template; set prompt_format in EvaluationOptions to "
            '"chat" or "plain".'
        )
    if found == "chat" and _has_other_context(run, tokenizer, edits):
        warn(
            "the training chats begin with messages that the evaluation prompts do not have, for example a system "
            "prompt; set prompt_format in EvaluationOptions to ChatFormat(system=..., history=...)."
        )
    return found or "plain"


def warn_without_chats(run: EditRun, tokenizer: Any, sequences: Sequence[Sequence[int]]) -> None:
    """Warn if the training examples are chats, but none of the ``texts`` of a locality callback is a chat.

    Args:
        run: the run.
        tokenizer: the tokenizer of the texts.
        sequences: the token ids of the texts.
    """
    found = training_format(run, tokenizer) if getattr(tokenizer, "chat_template", None) else None
    if found is None or chat_format(found) is None:
        return
    is_a_chat = is_chat(tokenizer)
    if not any(is_a_chat(without_spaces(tokenizer.decode(ids))) for ids in sequences[:1000]):
        warn(
            f"the training examples are chats, but none of the {len(sequences)} texts in texts= is a chat, so these "
            "texts do not preserve the model's answers in chats; add conversations (records with the key "
            '"messages") to texts=.'
        )


def is_chat(tokenizer: Any) -> Any:
    """Return a function that checks whether a text is a chat in the format of the tokenizer's chat template.

    A text counts as a chat if it contains the part of the template between the user's message and the answer. Remove
    all white space from a text before you pass it to the function. Without a chat template, the function returns False.
    """
    header = ""
    if getattr(tokenizer, "chat_template", None):
        header = without_spaces(render_prompt(tokenizer, _PLACEHOLDER, "chat").rpartition(_PLACEHOLDER)[2])
    return lambda text: bool(header) and header in text


def owners_of_examples(host: Any) -> list[Any]:
    """Return the objects that store how the examples were made: the data module and the trainer's arguments."""
    owners = [getattr(getattr(host, "trainer", None), "datamodule", None)]
    arguments = getattr(host, "args", None)
    # EditSFTTrainer sets answer_end only if it has made the examples itself from edits.
    return [*owners, arguments] if getattr(arguments, "answer_end", None) is not None else owners


def first_examples(host: Any) -> list[Any]:
    """Return the first examples of a trainer's dataset.

    A dataset that cannot be indexed is not read, because it may be readable only once.
    """
    dataset: Any = getattr(getattr(host, "train_dataloader", None), "dataset", None)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return []
    return [dataset[index] for index in range(min(EXAMPLES, len(dataset)))]


def _is_conversation(example: Any) -> bool:
    values = (example.get(name) for name in ("messages", "prompt")) if isinstance(example, Mapping) else ()
    return any(isinstance(value, list) and value and isinstance(value[0], Mapping) for value in values)


def _has_other_context(run: EditRun, tokenizer: Any, edits: Sequence[Edit]) -> bool:
    """Return whether the training chats have other text before the prompts of the edits, such as a system prompt.

    The result is False if no chat contains the prompt of an edit. It is also False if any chat begins with the prompt
    of an edit.
    """
    texts = [without_spaces(_text_of(example, tokenizer)) for example in first_examples(run.host)]
    trained = [(text, edit) for edit in edits[:1000] for text in texts if without_spaces(edit.prompt) in text]
    begin = tokenizer.bos_token or ""
    return bool(trained) and not any(
        text.removeprefix(begin).startswith(
            without_spaces(render_prompt(tokenizer, edit.prompt, "chat")).removeprefix(begin)
        )
        for text, edit in trained
    )


def _text_of(example: Any, tokenizer: Any) -> str:
    is_mapping = isinstance(example, Mapping)
    ids = example.get("input_ids") if is_mapping else getattr(example, "input_ids", None)
    if ids is None and is_mapping and isinstance(example.get("prompt"), str):
        # Trainers that generate their completions (GRPO, SDFT, ...) tokenize the prompts during training.
        return example["prompt"]
    return tokenizer.decode(list(ids)) if isinstance(ids, Iterable) else ""
