"""Find out in which prompt format the training examples of a run are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kedit_train.core.run import EditRun
from kedit_train.data.chat_format import PROMPT_FORMAT, PromptFormat, chat_format, read_format
from kedit_train.data.prompts import as_question, render_prompt
from kedit_train.edit import Edit
from kedit_train.errors import warn

# Number of training examples that are read to recognize their format.
EXAMPLES = 8
_PLACEHOLDER = "kedittrainquestion"


def training_format(run: EditRun, tokenizer: Any, edits: Sequence[Edit] = ()) -> PromptFormat | None:
    """Return the prompt format of the training examples, or None if it cannot be known.

    A data module says its format in an attribute ``prompt_format``, as ``EditDataModule`` does, and so do the arguments
    of ``EditSFTTrainer``. Other trainers of ``transformers`` and TRL have a dataset, whose first examples are compared
    with the chat template.

    Args:
        run: the run. Its data must be known, which is the case when a callback attaches.
        tokenizer: the tokenizer that the examples were tokenized with.
        edits: the edits. Their prompts tell the format "question" from plain text.
    """
    for owner in owners_of_examples(run.host):
        declared = read_format(getattr(owner, "prompt_format", None))
        if declared is not None and PROMPT_FORMAT.holds(declared):
            return declared
    examples = first_examples(run.host)
    if any(map(_is_conversation, examples)):
        return "chat"
    texts = [_squeeze(text) for example in examples if (text := _text_of(example, tokenizer))]
    if not texts:
        return None
    if any(map(is_chat(tokenizer), texts)):
        return "chat"
    # Only prompts that the model trains on can tell a question from plain text.
    questions = (_squeeze(as_question(edit.prompt)) for edit in edits[:1000])
    return "question" if any(question in text for question in questions for text in texts) else "plain"


def resolve_format(run: EditRun, tokenizer: Any, edits: Sequence[Edit]) -> PromptFormat:
    """Return the format of the training examples. If it is unknown, return "plain".

    A warning is issued if the format is unknown and the tokenizer has a chat template, because the training examples
    may then be chats. A warning is also issued if they are chats for which this tokenizer has no template, or if they
    begin with messages (such as a system prompt) with which the prompts are not asked.
    """
    found = training_format(run, tokenizer, edits)
    if found is not None and chat_format(found) is not None and not getattr(tokenizer, "chat_template", None):
        warn(
            "the training examples are chats, but the prompts are asked as plain text, because the tokenizer has no "
            "chat template; set tokenizer.chat_template to the template of the training examples."
        )
        return "plain"
    if found is None and getattr(tokenizer, "chat_template", None):
        warn(
            f"the prompts are asked as plain text, because this {run.host.name} run does not say whether its training "
            "examples use the tokenizer's chat template; set prompt_format in EvaluationOptions to "
            '"chat" or "plain".'
        )
    if found == "chat" and _has_other_context(run, tokenizer, edits):
        warn(
            "the training chats begin with other messages than the prompts that are asked, for example with a system "
            "prompt; set prompt_format in EvaluationOptions to ChatFormat(system=..., history=...)."
        )
    return found or "plain"


def warn_without_chats(run: EditRun, tokenizer: Any, sequences: Sequence[Sequence[int]]) -> None:
    """Warn if the training examples are chats and none of the locality texts is a chat.

    Args:
        run: the run.
        tokenizer: the tokenizer of the texts.
        sequences: the token ids of the texts.
    """
    found = training_format(run, tokenizer) if getattr(tokenizer, "chat_template", None) else None
    if found is None or chat_format(found) is None:
        return
    is_a_chat = is_chat(tokenizer)
    if not any(is_a_chat(_squeeze(tokenizer.decode(ids))) for ids in sequences[:1000]):
        warn(
            f"the training examples are chats, but none of the {len(sequences)} texts is, so nothing keeps the answers "
            'in other chats; add conversations to the texts: records with "messages".'
        )


def is_chat(tokenizer: Any) -> Any:
    """Return a function that says whether a text without spaces contains an answer in the tokenizer's chat template.

    The function looks for the text that the template puts between the user's message and the answer. System prompts
    and the messages themselves do not matter.
    """
    header = ""
    if getattr(tokenizer, "chat_template", None):
        header = _squeeze(render_prompt(tokenizer, _PLACEHOLDER, "chat").rpartition(_PLACEHOLDER)[2])
    return lambda text: bool(header) and header in text


def owners_of_examples(host: Any) -> list[Any]:
    """Return the objects of the training loop that know how the edits became examples: a data module, or arguments."""
    owners = [getattr(getattr(host, "trainer", None), "datamodule", None)]
    arguments = getattr(host, "args", None)
    # EditSFTTrainer sets answer_end if it has made the examples, and not if it trains on another dataset.
    return [*owners, arguments] if getattr(arguments, "answer_end", None) is not None else owners


def first_examples(host: Any) -> list[Any]:
    """Return the first examples of the dataset of a trainer. A dataset that can be read only once is not read."""
    dataset: Any = getattr(getattr(host, "train_dataloader", None), "dataset", None)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return []
    return [dataset[index] for index in range(min(EXAMPLES, len(dataset)))]


def _is_conversation(example: Any) -> bool:
    values = (example.get(name) for name in ("messages", "prompt")) if isinstance(example, Mapping) else ()
    return any(isinstance(value, list) and value and isinstance(value[0], Mapping) for value in values)


def _has_other_context(run: EditRun, tokenizer: Any, edits: Sequence[Edit]) -> bool:
    """Return whether the training chats contain prompts of the edits, but all of them after other messages."""
    texts = [_squeeze(_text_of(example, tokenizer)) for example in first_examples(run.host)]
    trained = [(text, edit) for edit in edits[:1000] for text in texts if _squeeze(edit.prompt) in text]
    begin = tokenizer.bos_token or ""
    return bool(trained) and not any(
        text.removeprefix(begin).startswith(_squeeze(render_prompt(tokenizer, edit.prompt, "chat")).removeprefix(begin))
        for text, edit in trained
    )


def _text_of(example: Any, tokenizer: Any) -> str:
    is_mapping = isinstance(example, Mapping)
    ids = example.get("input_ids") if is_mapping else getattr(example, "input_ids", None)
    return tokenizer.decode(list(ids)) if isinstance(ids, Iterable) else ""


def _squeeze(text: str) -> str:
    return "".join(text.split())
