"""A second model as the reference of a divergence: loaded, and checked to have the same vocabulary."""

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
    """A second model that takes the place of the model before the edit in :class:`~kedit_train.callbacks.KLLocality`.

    For every token, its ``top_k`` most probable next tokens are stored, and the probability of all other tokens
    together. The divergence is taken between these ``top_k + 1`` probabilities and those of the edited model, so it is
    a lower bound of the full divergence.

    Args:
        model: a module, or a name or path that transformers can load. It must have the vocabulary of the edited model.
        top_k: number of tokens to store.

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
        """Return ``value`` if it is a ``Teacher``, else one made from a model or a mapping of arguments."""
        if isinstance(value, Mapping):
            return from_mapping(cls, value)
        return value if isinstance(value, Teacher) else cls(value)


def load_teacher(teacher: str | Path | nn.Module, run: EditRun, tokenizer: Any) -> tuple[nn.Module, int]:
    """Load a teacher and compare its vocabulary with that of the run's model.

    Args:
        teacher: a module, or a name or path that transformers can load. It is loaded on the CPU, in the dtype in which
            it is stored.
        run: the run.
        tokenizer: tokenizer of the run's model.

    Returns:
        The teacher's language model, and the size of the vocabulary that both models share.

    Raises:
        EditError: the teacher cannot be loaded, is the edited model itself, or has another vocabulary.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(teacher, nn.Module):
        model, name = find_language_model(teacher), getattr(getattr(teacher, "config", None), "_name_or_path", "")
        if model is None:
            raise EditError(
                f"teacher must be a causal language model, got {type(teacher).__name__} without a language-model head."
            )
        if model is run.language_model:
            raise EditError(
                "teacher is the model that is edited; leave teacher out, the default is the model before the edit."
            )
    else:
        name = str(teacher)
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EditError(
                f"no teacher can be loaded from {name!r} ({reason}); give a name, a path or a module."
            ) from error
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab() if name else None
    except (OSError, ValueError):
        vocabulary = None
    sizes = [int(m.config.get_text_config().vocab_size) for m in (model, run.language_model)]  # type: ignore[union-attr]
    if vocabulary is None:
        # A module without a tokenizer: only the sizes of the vocabularies can be compared.
        same, size = sizes[0] == sizes[1], sizes[0]
    else:
        own = tokenizer.get_vocab()
        same, size = vocabulary == own, max(own.values()) + 1
    if not same or size > min(sizes):
        raise EditError(
            f"teacher {name or type(model).__name__!r} has another vocabulary than the edited model, so their "
            "distributions cannot be compared token by token; use a teacher with the same tokenizer."
        )
    return model, size


def teacher_head(teacher: nn.Module, device: torch.device, context: Any) -> OutputHead:
    """Return the teacher's verified output head, with the teacher on ``device``.

    Args:
        teacher: a causal language model.
        device: where the forward passes run.
        context: context manager for the forward pass of the check (autocast).
    """
    head = OutputHead(teacher.to(device))
    try:
        head.verify(context)
    except BaseException:
        head.remove()
        raise
    return head
