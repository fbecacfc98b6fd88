"""The scripted model of the evaluation tests, and a model that learns edits by a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from evaluation.conftest import scripted_model
from modes.teacher import N, says, token_ids
from torch import nn

__all__ = ["scripted_model"]


@pytest.fixture
def learner(scripted_model: Any) -> Callable[[int], tuple[Any, Any]]:
    """A model whose answers depend on its parameter ``knows``, with one number per edit."""

    def make(n: int = N) -> tuple[Any, Any]:
        model, tokenizer = scripted_model(says([False] * n))
        model.register_parameter("knows", nn.Parameter(torch.zeros(n)))

        def read(module: Any, *_: Any) -> None:
            lines = says([bool(k > 0.5) for k in module.knows]).items()
            module.script = [(token_ids(tokenizer, p), token_ids(tokenizer, a), False) for p, a in lines]

        model.register_forward_pre_hook(read, with_kwargs=False)
        return model, tokenizer

    return make
