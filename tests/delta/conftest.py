"""Tiny random models and edited copies of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta.tiny import DOWN
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture
def make() -> Callable[..., Any]:
    """``make(dtype, **config)`` returns the same tiny Llama every time."""

    def build(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        torch.manual_seed(7)
        shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 61}
        return AutoModelForCausalLM.from_config(LlamaConfig(**(shape | config))).to(dtype)

    return build


@pytest.fixture
def edited(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same Llama with changed weights: all of one matrix and three columns of another."""

    def build(dtype: torch.dtype = torch.float32, seed: int = 1, size: float = 0.05, **config: Any) -> Any:
        model = make(dtype, **config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight = model.get_parameter(DOWN)
            weight.add_((torch.randn(weight.shape, generator=generator) * size).to(dtype))
            other = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
            other[:, 2:5] += (torch.randn((16, 3), generator=generator) * size).to(dtype)
        return model

    return build
