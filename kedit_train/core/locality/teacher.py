"""Another model whose answers are to be kept: loaded, and checked to speak of the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kedit_train.core.output_head import OutputHead, find_language_model
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


def open_teacher(teacher: Any, run: EditRun, tokenizer: Any) -> tuple[nn.Module, int]:
    """Return the teacher's language model and the size of the vocabulary that both models share.

    Args:
        teacher: a module, or a name or path that transformers loads (in the dtype it is stored in, on the CPU).
        tokenizer: of the model that is edited.

    Raises:
        EditError: it cannot be loaded, is the edited model itself, or its tokens are others.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(teacher, nn.Module):
        model, name = find_language_model(teacher), getattr(getattr(teacher, "config", None), "_name_or_path", "")
        if model is None:
            raise EditError(f"teacher {type(teacher).__name__} has no language-model head")
        if model is run.language_model:
            raise EditError("teacher is the very model that is edited; leave it out, that is the default")
    else:
        name = str(teacher)
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EditError(f"no teacher at {name!r} ({reason}); give a name, a path or a module") from error
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab() if name else None
    except (OSError, ValueError):
        vocabulary = None
    sizes = [int(m.config.get_text_config().vocab_size) for m in (model, run.language_model)]  # type: ignore[union-attr]
    if vocabulary is None:
        # A bare module: its tokens have no names to compare.
        same, size = sizes[0] == sizes[1], sizes[0]
    else:
        own = tokenizer.get_vocab()
        same, size = vocabulary == own, max(own.values()) + 1
    if not same or size > min(sizes):
        raise EditError(
            f"the vocabulary of teacher {name or type(model).__name__!r} is not that of the model being "
            "edited, so their answers cannot be compared token by token; take a teacher with the same tokenizer"
        )
    return model, size


def head_of(teacher: nn.Module, device: torch.device, context: Any) -> OutputHead:
    """The teacher's verified output head, the teacher on this device."""
    head = OutputHead(teacher.to(device))
    try:
        head.verify(context)
    except BaseException:
        head.remove()
        raise
    return head
