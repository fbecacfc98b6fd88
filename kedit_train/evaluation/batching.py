"""What generation and teacher forcing share: the model held still, rows of like length together, a bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kedit_train.errors import EditError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own ``training`` flag back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model_flags = set(map(id, training))
        for module in model.modules():
            module.training = id(module) in model_flags


def context_length(model: nn.Module) -> int | None:
    """The number of positions that the model was made for, where its configuration says so."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies (the embedding, in every causal language model)."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def shorten(text: str, width: int = 60) -> str:
    """``text`` on one line, for a message: at most ``width`` characters, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def require_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise EditError(f"batch_size is {batch_size}: give at least 1")


def batches(rows: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def padded(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Rows of ids as ``(input_ids, attention_mask)``, both ``[batch, longest]`` int64, padded on ``side``."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[at, where] = torch.tensor(row, dtype=torch.long)
        mask[at, where] = 1
    return ids, mask


def bar(total: int, what: str, progress: bool) -> tqdm:
    """A progress bar over ``total`` rows: only in a terminal, gone when done, so that a log stays readable."""
    return tqdm(total=total, desc=what, unit="row", leave=False, disable=None if progress else True)
