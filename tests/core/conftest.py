"""Tiny random models of many families, built from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

VOCAB = 61
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
_GEMMA = _SHAPE | {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
# Dropout is on by default in GPT-2 and Phi. These arguments turn it off, and a test can turn it on again.
_STILL = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, _SHAPE),
    "llama-tied": (tf.LlamaConfig, _SHAPE | {"tie_word_embeddings": True}),
    "qwen3": (tf.Qwen3Config, _SHAPE | {"head_dim": 8}),
    "gemma2": (tf.Gemma2Config, _GEMMA),
    "gemma3": (tf.Gemma3TextConfig, _GEMMA),
    "cohere": (tf.CohereConfig, _SHAPE | {"logit_scale": 0.0625}),
    "granite": (tf.GraniteConfig, _SHAPE | {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "mixtral": (tf.MixtralConfig, _SHAPE | {"num_local_experts": 4, "output_router_logits": True}),
    "phi": (tf.PhiConfig, _SHAPE | {"num_key_value_heads": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2": (tf.GPT2Config, _GPT2 | _STILL),
    "bert": (tf.BertConfig, _SHAPE),
    "t5": (tf.T5Config, _T5),
}


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """``tiny("llama", num_hidden_layers=24)`` returns a causal language model whose random weights are not tiny."""

    def build(family: str, cls: Any = tf.AutoModelForCausalLM, **config: Any) -> Any:
        make = getattr(cls, "from_config", cls)
        kind, defaults = _CONFIGS[family]
        model = make(kind(**defaults | config))
        with torch.no_grad():
            for parameter in model.parameters():
                # With weights of 0.02, all tokens would be about equally probable, and a bias of zero would have no
                # effect.
                if parameter.ndim > 1 or not bool(parameter.any()):
                    parameter.copy_(torch.randn_like(parameter) * 0.25)
        return model.float()

    return build
