"""How well a model still predicts text that has nothing to do with the edits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kedit_train.data.tokenization import Encoded, context_length, pad_token_id, token_ids
from kedit_train.evaluation.asking.batching import DivergedError, bar, evaluating, unwrapped
from kedit_train.evaluation.asking.logits import target_logits
from kedit_train.evaluation.scoring.bootstrap import Score, ratio_scores


def text_losses(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = 512,
    progress: bool = False,
) -> list[tuple[float, int]]:
    """For each text the sum of its tokens' negative log-probabilities (nats) and their number.

    A text longer than ``max_length`` or the model's context is read in windows, one after the other; the first token
    of each has nothing before it and does not count.

    Raises:
        EditError: NaN logits.
    """
    inner: Any = unwrapped(model)
    width = min(max_length, context_length(inner.config) or max_length)
    rows: list[Encoded] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        ids = token_ids(tokenizer, text, special=True)
        windows = [ids[i : i + width] for i in range(0, len(ids), width)]
        kept = [Encoded(window, 1) for window in windows if len(window) > 1]
        rows += kept
        owners += [number] * len(kept)
    sums, counts = [0.0] * len(texts), [0] * len(texts)
    with evaluating(inner), bar(len(rows), "reading texts", progress) as shown:
        for numbers, logits, labels in target_logits(
            inner, rows, pad_id=pad_token_id(tokenizer), batch_size=batch_size
        ):
            for number, own, wanted in zip(numbers, logits, labels, strict=True):
                loss = float(torch.nn.functional.cross_entropy(own, wanted, reduction="sum"))
                if math.isnan(loss):
                    raise DivergedError(texts[owners[number]])
                sums[owners[number]] += loss
                counts[owners[number]] += len(wanted)
            shown.update(len(numbers))
    return list(zip(sums, counts, strict=True))


def perplexity(losses: Sequence[tuple[float, int]], seed: int = 0) -> Score:
    """exp of the mean loss per token, with an interval over texts; ``n`` counts tokens."""
    totals = torch.tensor([[total] for total, _ in losses], dtype=torch.float64)
    counts = torch.tensor([[count] for _, count in losses])
    (found,) = ratio_scores(totals, counts, seed=seed)
    value, low, high = (None if x is None else math.exp(x) for x in (found.value, found.low, found.high))
    return Score(value, found.n, low, high)
