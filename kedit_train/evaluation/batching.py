"""What generation and teacher forcing share: the model held still, rows of like length together, a bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from kedit_train.core.output_head import evaluation_mode
from kedit_train.errors import EditError

Row = TypeVar("Row")


def unwrapped(model: nn.Module) -> Any:
    """The language model inside what a trainer wrapped around it (DistributedDataParallel).

    Raises:
        EditError: there is none.
    """
    inner: Any = model
    while not hasattr(inner, "generate"):
        if not isinstance(getattr(inner, "module", None), nn.Module):
            raise EditError(f"{type(model).__name__} cannot generate: give the causal language model inside it")
        inner = inner.module
    return inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own ``training`` flag back."""
    with evaluation_mode(model), torch.no_grad():
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies (the embedding, in every causal language model)."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def shorten(text: str, width: int = 60) -> str:
    """``text`` on one line, for a message: at most ``width`` characters, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def batches(rows: Sequence[Row], batch_size: int) -> list[Sequence[Row]]:
    """``rows`` in their order, ``batch_size`` at a time."""
    if batch_size < 1:
        raise EditError(f"batch_size is {batch_size}: give at least 1")
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def bar(total: int, what: str, progress: bool) -> tqdm:
    """A progress bar over ``total`` rows: only in a terminal, gone when done, so that a log stays readable."""
    return tqdm(total=total, desc=what, unit="row", leave=False, disable=None if progress else True)
