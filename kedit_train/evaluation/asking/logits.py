"""Logits at chosen positions of many rows, a batch at a time: what every score under teacher forcing is read from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from kedit_train.data.tokenization import Encoded, collate
from kedit_train.evaluation.asking.batching import base_of, batches, device_of, learns_prompts
from kedit_train.functional.labels import IGNORE_INDEX

# Logits of a batch: at most 1 GiB in fp32.
_NUMBERS = 2**28


def takes(model: Any, argument: str) -> bool:
    """Whether ``forward`` of the language model itself (below adapters) has this argument."""
    return argument in inspect.signature(base_of(model).forward).parameters


def target_logits(
    model: Any, rows: Sequence[Encoded], *, pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
    """Run rows and give the logits that predict each row's target.

    Rows are sorted by length and padded on the right, and only the positions that predict a target are projected to
    the vocabulary, where the model's ``forward`` allows it (``logits_to_keep``). A batch has fewer rows than
    ``batch_size`` where its logits would take more than 1 GiB.

    Yields:
        For each batch the numbers of its rows, their logits ([targets, V] in fp32 each) and labels ([targets] each).
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), rows[i].input_ids))
    chooses = takes(model, "logits_to_keep") and not learns_prompts(model)
    for chosen in batches(order, batch_size):
        longest = len(rows[chosen[0]].input_ids)
        most = max(1, _NUMBERS // (longest * vocabulary(model)))
        for part in batches(chosen, most):
            own = [rows[i] for i in part]
            logits, labels = _of_targets(model, own, pad_id, chooses)
            lengths = [len(row.input_ids) - row.target_start for row in own]
            yield list(part), list(logits.split(lengths)), list(labels.split(lengths))


def vocabulary(model: Any) -> int:
    """How many tokens the model chooses from."""
    return int(base_of(model).config.get_text_config().vocab_size)


def _of_targets(model: Any, rows: Sequence[Encoded], pad_id: int, chooses: bool) -> tuple[Tensor, Tensor]:
    batch = collate(rows, pad_id=pad_id, padding_side="right")
    next_ids = batch["labels"][:, 1:]
    at_row, at_position = (next_ids != IGNORE_INDEX).nonzero(as_tuple=True)
    device = device_of(model)
    given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")} | {"use_cache": False}
    if chooses:
        positions, column = at_position.unique(return_inverse=True)
        logits = model(**given, logits_to_keep=positions.to(device)).logits
    else:
        # A learned prompt in front has logits too: the row's own are the last ones.
        column, logits = at_position, model(**given).logits[:, -next_ids.shape[1] - 1 :]
    chosen = logits[at_row.to(logits.device), column.to(logits.device)].float()
    return chosen, next_ids[at_row, at_position].to(logits.device)
