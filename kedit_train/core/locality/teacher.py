"""Load a teacher model, and check that it has the same vocabulary as the edited model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kedit_train.arguments import check_arguments, from_mapping, integer_from
from kedit_train.core.output_head import OutputHead, find_language_model
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


@dataclass(frozen=True)
class Teacher:
    """A second model that :class:`~kedit_train.callbacks.KLLocality` uses as the reference model.

    Without a teacher, the reference model is the model before the edit.

    For every token, ``top_k + 1`` numbers are stored: the teacher's ``top_k`` highest next-token probabilities and the
    total probability of all other tokens. The divergence of the edited model from the teacher is computed from these
    numbers, so the computed value is a lower bound of the divergence over the whole vocabulary.

    Args:
        model: a module, or a name or path that transformers can load. It must have the vocabulary of the edited model.
        top_k: number of next-token probabilities to store for every token.

    Raises:
        EditError: ``top_k`` is not an integer above 0.

    Example:
        >>> Teacher("path/to/original_model", top_k=64)
        Teacher(model='path/to/original_model', top_k=64)
    """

    model: str | Path | nn.Module
    _: KW_ONLY
    top_k: int = 256

    def __post_init__(self) -> None:
        check_arguments(self, top_k=(self.top_k, integer_from(1)))

    @classmethod
    def of(cls, value: Teacher | str | Path | nn.Module | Mapping[str, Any]) -> Teacher:
        """Convert ``value`` to a ``Teacher``. ``value`` may be a model, a name, a path or a mapping of arguments."""
        if isinstance(value, Mapping):
            return from_mapping(cls, value)
        return value if isinstance(value, Teacher) else cls(value)


def load_teacher(teacher: str | Path | nn.Module, run: EditRun, tokenizer: Any) -> tuple[nn.Module, int]:
    """Load a teacher and check that it has the same vocabulary as the edited model.

    Args:
        teacher: a module, or a name or path that transformers can load. A name or path is loaded on the CPU, in the
            dtype of the checkpoint.
        run: the run.
        tokenizer: tokenizer of the run's model.

    Returns:
        The teacher's language model, and the size of the common vocabulary.

    Raises:
        EditError: the teacher cannot be loaded, is the edited model itself, or has another vocabulary.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(teacher, nn.Module):
        model, name = find_language_model(teacher), getattr(getattr(teacher, "config", None), "_name_or_path", "")
        if model is None:
            raise EditError(
                f"teacher must be a causal language model, got {type(teacher).__name__} without a language-model head; "
                "load the teacher with AutoModelForCausalLM."
            )
        if model is run.language_model:
            raise EditError(
                "teacher must not be the edited model itself; remove teacher, because the model before the edit is the "
                "default reference."
            )
    else:
        name = str(teacher)
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EditError(
                f"teacher cannot be loaded from {name!r} ({reason}); pass a model name, a path or a module."
            ) from error
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab() if name else None
    except (OSError, ValueError):
        vocabulary = None
    sizes = [int(m.config.get_text_config().vocab_size) for m in (model, run.language_model)]  # type: ignore[union-attr]
    if vocabulary is None:
        # Without the teacher's tokenizer, only the sizes of the vocabularies can be compared.
        same, size = sizes[0] == sizes[1], sizes[0]
    else:
        own = tokenizer.get_vocab()
        same, size = vocabulary == own, max(own.values()) + 1
    if not same or size > min(sizes):
        raise EditError(
            f"teacher {name or type(model).__name__!r} has another vocabulary than the edited model, so the "
            "next-token distributions cannot be compared; use a teacher with the same tokenizer."
        )
    return model, size


def teacher_head(teacher: nn.Module, device: torch.device, context: Any) -> OutputHead:
    """Move a teacher to ``device``, and return its output head.

    :meth:`OutputHead.verify` checks the head first.

    Args:
        teacher: a causal language model.
        device: where the forward passes run.
        context: context manager for the forward pass of this check, for example autocast.
    """
    head = OutputHead(teacher.to(device))
    try:
        head.verify(context)
    except BaseException:
        head.remove()
        raise
    return head
