"""What generation and teacher forcing share: the model held still, rows of like length together, a bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from kedit_train.core.output_head import evaluation_mode
from kedit_train.data.tokenization import shorten
from kedit_train.errors import EditError

Row = TypeVar("Row")


class DivergedError(EditError):
    """The model gives NaN after ``prompt``."""

    def __init__(self, prompt: str, edit: str | None = None) -> None:
        named = "" if edit is None else f"edit {edit}: "
        super().__init__(
            f"{named}the model gives NaN logits after {shorten(prompt)!r}: its weights have diverged; "
            "lower the learning rate or use a wider dtype"
        )
        self.prompt = prompt


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


def base_of(model: Any) -> Any:
    """The model inside an adapter of PEFT, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def learns_prompts(model: Any) -> bool:
    """Whether an adapter of PEFT puts learned positions in front of the text, which shifts all others."""
    return hasattr(model, "get_base_model") and getattr(model.active_peft_config, "is_prompt_learning", False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own ``training`` flag back."""
    with evaluation_mode(model), torch.no_grad():
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies (the embedding, in every causal language model)."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def batches(rows: Sequence[Row], batch_size: int) -> list[Sequence[Row]]:
    """``rows`` in their order, ``batch_size`` at a time."""
    if batch_size < 1:
        raise EditError(f"batch_size is {batch_size}: give at least 1")
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def bar(total: int, what: str, progress: bool) -> tqdm:
    """A progress bar over ``total`` rows: only in a terminal, gone when done, so that a log stays readable."""
    return tqdm(total=total, desc=what, unit="row", leave=False, disable=None if progress else True)
