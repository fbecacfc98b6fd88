"""Tiny random models and a word tokenizer for the tests of callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

WORDS = ["<unk>", "</s>", *(f"w{i}" for i in range(59))]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of 61 tokens: "w0" to "w58" and two special tokens; no pad token."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def make() -> Callable[..., Any]:
    """A function ``make("llama", **config)`` that returns a causal language model with random weights."""

    def build(family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        if family == "gpt2":
            shape: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
            still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
            model = AutoModelForCausalLM.from_config(GPT2Config(**{"vocab_size": 61, **shape, **still, **config}))
        else:
            shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            shape |= {"max_position_embeddings": 64, "num_key_value_heads": 1}
            model = AutoModelForCausalLM.from_config(LlamaConfig(**{"vocab_size": 61, **shape, **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.25)
        return model.to(dtype)

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[5, 7, 11, 13, 17, 3], [2, 4, 8, 16, 32, 60]])
