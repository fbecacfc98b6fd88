"""Find the prompts of the edits in tokenized training examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kedit_train.data.tokenization import Encoded
from kedit_train.data.visible import without_spaces
from kedit_train.edit import Edit

# The maximum number of training examples that are searched, and of edits whose prompts are searched for.
_EXAMPLES = 10_000
_EDITS = 1000
# The columns that mark the tokens that are trained, in the order in which they are looked up.
_MASKS = ("completion_mask", "assistant_masks")


def trained_prompts(host: Any, tokenizer: Any, edits: Sequence[Edit]) -> list[list[int]]:
    """Return the prompts of the edits as they are tokenized in the training examples.

    In a training example, a chat template or other text, such as a system prompt, may surround a prompt. Each result
    therefore contains all token ids from the start of the example to a target (a sequence of trained tokens). If the
    example has several targets, the prompt must be between the previous target and this target.

    Only tokenized examples that mark the trained tokens are read. These are dictionaries with ``labels``,
    ``completion_mask`` or ``assistant_masks``, and the results of ``EditDataset.encode``.

    Args:
        host: the host of the run. A plain training loop has no dataset, so the result is empty.
        tokenizer: the tokenizer of the examples.
        edits: the edits.
    """
    asked = [without_spaces(edit.prompt) for edit in edits[:_EDITS]]
    found: dict[tuple[int, ...], None] = {}
    for example in _examples(host):
        for ids, begin in _before_targets(example):
            if tuple(ids) not in found:
                text = without_spaces(tokenizer.decode(ids[begin:]))
                if any(prompt in text for prompt in asked):
                    found[tuple(ids)] = None
    return [list(ids) for ids in found]


def _examples(host: Any) -> Iterator[Any]:
    """Yield the examples of the training dataset. A dataset that can be read only once is not read."""
    loader = getattr(host, "train_dataloader", None)
    trainer: Any = getattr(host, "trainer", None)
    if loader is None and hasattr(trainer, "fit_loop"):
        # Lightning sets up the data only when the first epoch begins.
        trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
    dataset: Any = getattr(loader, "dataset", None)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        yield from (dataset[index] for index in range(min(_EXAMPLES, len(dataset))))


def _before_targets(example: Any) -> Iterator[tuple[list[int], int]]:
    """Yield the token ids before each target of an example, and the position after the previous target.

    For the first target, this position is 0.
    """
    if isinstance(example, Mapping) and example.get("input_ids") is not None:
        ids = [int(token) for token in example["input_ids"]]
        trained = _trained(example, len(ids))
    elif isinstance(example, Encoded):
        ids = example.input_ids
        trained = [position >= example.target_start for position in range(len(ids))]
    else:
        return
    ended = 0
    for position in range(1, len(trained)):
        if trained[position] and not trained[position - 1]:
            yield ids[:position], ended
        elif trained[position - 1] and not trained[position]:
            ended = position


def _trained(row: Mapping[str, Any], length: int) -> list[bool]:
    """Return which tokens of an example are trained, or an empty list if it has no valid mask and no valid labels."""
    mask = next((row[name] for name in _MASKS if row.get(name) is not None), None)
    labels = row.get("labels")
    if mask is None and labels is not None:
        mask = [int(label) >= 0 for label in labels]
    return [bool(value) for value in mask] if mask is not None and len(mask) == length else []
