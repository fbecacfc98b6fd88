"""Helpers for the forward passes of an evaluation: find the model, disable gradients, make batches, show progress."""

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

Item = TypeVar("Item")


class DivergedError(EditError):
    """The model's logits are NaN.

    Args:
        prompt: the prompt or text after which the logits are NaN.
        edit: the name of the edit that the prompt belongs to. None if the edit is unknown.
    """

    def __init__(self, prompt: str, edit: str | None = None) -> None:
        owner = "" if edit is None else f"edit {edit!r}: "
        super().__init__(
            f"{owner}the model gives NaN logits after {shorten(prompt)!r}, so its weights have diverged; "
            "lower the learning rate, or train in a dtype with a larger range, such as bfloat16 or float32."
        )
        self.prompt = prompt


def unwrap_model(model: nn.Module) -> Any:
    """Return the language model inside a trainer's wrapper such as DistributedDataParallel.

    Raises:
        EditError: the wrapper contains no model with a ``generate`` method.
    """
    inner: Any = model
    while not hasattr(inner, "generate"):
        if not isinstance(getattr(inner, "module", None), nn.Module):
            raise EditError(
                f"model must be a causal language model, got {type(model).__name__}, which cannot generate text; load "
                "the model with AutoModelForCausalLM."
            )
        inner = inner.module
    return inner


def uses_prompt_learning(model: Any) -> bool:
    """Return True if a PEFT adapter puts learned tokens in front of the text, which shifts all text positions."""
    return hasattr(model, "get_base_model") and getattr(model.active_peft_config, "is_prompt_learning", False)


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode without gradients; every module's ``training`` flag is restored afterwards."""
    with evaluation_mode(model), torch.no_grad():
        yield


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, which is the embedding in a causal language model."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def split_into_batches(items: Sequence[Item], batch_size: int) -> list[Sequence[Item]]:
    """Split ``items`` into consecutive batches of at most ``batch_size`` items."""
    if batch_size < 1:
        raise EditError(f"batch_size must be >= 1, got {batch_size}.")
    return [items[start : start + batch_size] for start in range(0, len(items), batch_size)]


def progress_bar(total: int, description: str, progress: bool) -> tqdm[Any]:
    """Return a progress bar that is shown only in a terminal and is removed when the work is done."""
    return tqdm(total=total, desc=description, unit="row", leave=False, disable=None if progress else True)
