"""Compute the logits that predict the tokens of a target, in batches. Teacher-forced scores need these logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from kedit_train.core.scope.adapters import base_model
from kedit_train.data.tokenization import Encoded, collate
from kedit_train.evaluation.asking.batching import (
    model_device,
    split_into_batches,
    uses_prompt_learning,
)
from kedit_train.functional.labels import IGNORE_INDEX

# Maximum number of logits in one batch. They take 1 GiB in fp32.
MAX_LOGITS = 2**28


def accepts_argument(model: Any, argument: str) -> bool:
    """Return True if ``forward`` of the model has an argument of this name. For PEFT, the base model is inspected."""
    return argument in inspect.signature(base_model(model).forward).parameters


def target_logits(
    model: Any, sequences: Sequence[Encoded], *, pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
    """Run the sequences through the model and yield the logits that predict each target.

    The sequences are sorted by length and padded on the right. If ``forward`` has the argument ``logits_to_keep``, the
    model computes logits only at the positions that predict a target. A batch has fewer than ``batch_size`` sequences
    if its logits would take more than 1 GiB.

    Args:
        model: a model in evaluation mode. The caller disables gradients.
        sequences: the texts. Each item contains the token ids of a text and the index of its first target token.
        pad_id: the id of the padding token.
        batch_size: maximum number of sequences per batch.

    Yields:
        For each batch, a tuple of three lists: indices in ``sequences``, logits ([target tokens, vocabulary] in fp32)
        and labels ([target tokens]). Each list has one item per sequence of the batch.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].input_ids), sequences[i].input_ids))
    can_select = accepts_argument(model, "logits_to_keep") and not uses_prompt_learning(model)
    for batch in split_into_batches(order, batch_size):
        longest = len(sequences[batch[0]].input_ids)
        limit = max(1, MAX_LOGITS // (longest * vocabulary_size(model)))
        for part in split_into_batches(batch, limit):
            chosen = [sequences[i] for i in part]
            logits, labels = _run_batch(model, chosen, pad_id, can_select)
            lengths = [len(sequence.input_ids) - sequence.target_start for sequence in chosen]
            yield list(part), list(logits.split(lengths)), list(labels.split(lengths))


def vocabulary_size(model: Any) -> int:
    """Return the number of tokens in the model's vocabulary."""
    return int(base_model(model).config.get_text_config().vocab_size)


def _run_batch(model: Any, sequences: Sequence[Encoded], pad_id: int, can_select: bool) -> tuple[Tensor, Tensor]:
    """Return logits [n, vocabulary] and labels [n] for the n target tokens of all sequences."""
    batch = collate(sequences, pad_id=pad_id, padding_side="right")
    next_ids = batch["labels"][:, 1:]
    rows, positions = (next_ids != IGNORE_INDEX).nonzero(as_tuple=True)
    device = model_device(model)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")} | {"use_cache": False}
    if can_select:
        selected, columns = positions.unique(return_inverse=True)
        logits = model(**inputs, logits_to_keep=selected.to(device)).logits
    else:
        # A learned prompt in front of the sequence also has logits. The logits of the sequence come last.
        columns, logits = positions, model(**inputs).logits[:, -next_ids.shape[1] - 1 :]
    chosen = logits[rows.to(logits.device), columns.to(logits.device)].float()
    return chosen, next_ids[rows, positions].to(logits.device)
