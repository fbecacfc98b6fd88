"""Measure the perplexity of texts that are unrelated to the edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.data.conversations import RenderedConversation
from kedit_train.data.tokenization import Encoded, context_length, pad_token_id, token_ids
from kedit_train.evaluation.asking.batching import DivergedError, inference_context, progress_bar, unwrap_model
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
    visit: Callable[[int, int, Encoded, Tensor], None] | None = None,
) -> list[tuple[float, int]]:
    """Compute the total loss of each text.

    A text that is longer than ``max_length`` or the model's context is split into consecutive windows. The loss does
    not include the first token of a window, because this token has no context.

    Args:
        model: a causal language model. It is left unchanged.
        tokenizer: the model's tokenizer.
        texts: the texts.
        batch_size: windows per forward pass.
        max_length: maximum number of tokens per window.
        progress: show a progress bar in a terminal.
        visit: function that is called for every window. Its arguments are the number of the text, the number of the
            window in the text, the window, and the logits that predict its tokens, [tokens - 1, vocabulary] in fp32.

    Returns:
        One pair per text: the sum of the negative log-probabilities of its tokens, in nats, and the number of these
        tokens.

    Raises:
        EditError: the model gives NaN logits.
    """
    inner: Any = unwrap_model(model)
    width = min(max_length, context_length(inner.config) or max_length)
    windows: list[Encoded] = []
    text_numbers: list[int] = []
    places: list[int] = []
    for number, text in enumerate(texts):
        ids = token_ids(tokenizer, text, special=not isinstance(text, RenderedConversation))
        parts = [ids[i : i + width] for i in range(0, len(ids), width)]
        own = [Encoded(part, 1) for part in parts if len(part) > 1]
        windows += own
        text_numbers += [number] * len(own)
        places += range(len(own))
    sums, counts = [0.0] * len(texts), [0] * len(texts)
    pad_id = pad_token_id(tokenizer)
    with inference_context(inner), progress_bar(len(windows), "reading texts", progress) as bar:
        for numbers, logits, labels in target_logits(inner, windows, pad_id=pad_id, batch_size=batch_size):
            for number, own_logits, own_labels in zip(numbers, logits, labels, strict=True):
                loss = float(torch.nn.functional.cross_entropy(own_logits, own_labels, reduction="sum"))
                text_number = text_numbers[number]
                if math.isnan(loss):
                    raise DivergedError(texts[text_number])
                sums[text_number] += loss
                counts[text_number] += len(own_labels)
                if visit is not None:
                    visit(text_number, places[number], windows[number], own_logits)
            bar.update(len(numbers))
    return list(zip(sums, counts, strict=True))


def perplexity(losses: Sequence[tuple[float, int]], seed: int = 0) -> Score:
    """Return exp(mean loss per token), with a bootstrap interval over texts.

    Args:
        losses: the losses that :func:`text_losses` returns.
        seed: seed of the bootstrap.

    Returns:
        The score. Its ``n`` is the number of tokens.
    """
    totals = torch.tensor([[total] for total, _ in losses], dtype=torch.float64)
    counts = torch.tensor([[count] for _, count in losses])
    (loss,) = ratio_scores(totals, counts, seed=seed)
    value, low, high = (None if x is None else math.exp(x) for x in (loss.value, loss.low, loss.high))
    return Score(value, n=loss.n, low=low, high=high)
