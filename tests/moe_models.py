"""Tiny mixture-of-experts models with random weights, built from their configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

# The vocabulary of the bundled tokenizer of the world.
_SHAPE: dict[str, Any] = {
    "vocab_size": 1536,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_CONFIGS: dict[str, Any] = {
    "mixtral": lambda: tf.MixtralConfig(**_SHAPE, num_local_experts=4),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_SHAPE | _EXPERTS, head_dim=8),
    # With a shared expert.
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**_SHAPE | _EXPERTS, shared_expert_intermediate_size=8),
    # With a dense first layer.
    "deepseek_v3": lambda: tf.DeepseekV3Config(**_SHAPE | _EXPERTS | _GROUPS | _LATENT),
    # With biases, and weights of the shape [experts, in, out].
    "gpt_oss": lambda: tf.GptOssConfig(
        **_SHAPE, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 3, rope_parameters=None
    ),
    # The router returns its scores before its logits.
    "llama4": lambda: tf.Llama4TextConfig(
        **_SHAPE,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        intermediate_size_mlp=32,
        interleave_moe_layer_step=1,
    ),
}
FAMILIES = tuple(_CONFIGS)


def build(family: str, seed: int = 0) -> Any:
    """Return a causal language model in fp32."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(_CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial weights of 0.02 leave the experts almost equally likely.
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
            elif not bool(parameter.any()):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.float()
