"""Check the arguments of ``editing`` before the model is changed, and report a wrong argument in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kedit_train.arguments import Rule, check_arguments, cut, integer_from, optional
from kedit_train.callbacks.hosts.transformers import TransformersEvents
from kedit_train.core.tokenizer import TOKENIZER
from kedit_train.data.chat_format import check_format, read_format
from kedit_train.errors import EditError, reported_by


def check_editing(
    model: Any,
    callbacks: Any,
    tokenizer: Any,
    on_log: Any,
    log_every_n_steps: Any,
    edits: Any,
    epoch_steps: Any,
    prompt_format: Any,
) -> None:
    """Raise an :class:`EditError` for the first argument of ``editing`` that has a wrong type or value.

    ``edits`` is not checked here, because only some callbacks use it.
    """
    if not isinstance(model, nn.Module):
        raise EditError(
            f"model must be a loaded model, got {cut(repr(model))}; load it with AutoModelForCausalLM.",
            component="editing",
        )
    if isinstance(callbacks, TransformersEvents):
        raise EditError(f"callbacks must be a list, got {callbacks!r}; write [{callbacks!r}].", component="editing")
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str | bytes):
        raise EditError(f"callbacks must be a list of callbacks, got {cut(repr(callbacks))}.", component="editing")
    if not callbacks:
        raise EditError("callbacks must not be empty; pass at least one callback.", component="editing")
    for callback in callbacks:
        # A class instead of an instance passes this check, because EditRun.join reports it with its name.
        if not isinstance(callback, TransformersEvents | type):
            raise EditError(
                "each callback must be an instance of a class in kedit_train.callbacks or of your own subclass of "
                f"EditCallback, got {cut(repr(callback))}.",
                component="editing",
            )
    check_arguments(
        "editing",
        tokenizer=(tokenizer, optional(TOKENIZER)),
        on_log=(on_log, optional(Rule("a function", callable))),
        log_every_n_steps=(log_every_n_steps, integer_from(1)),
        epoch_steps=(epoch_steps, optional(integer_from(1))),
    )
    if prompt_format is not None:
        with reported_by("editing"):
            check_format(read_format(prompt_format), tokenizer)
