"""Small random models of two architectures, and a batch of prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

VOCAB, HIDDEN = 61, 16
PROMPTS = [[5, 9, 12, 7, 30], [8, 3, 44]]


def build(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    shape = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = (
        LlamaConfig(
            **shape, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=64,
        )
        if family == "llama"
        else GPT2Config(**shape, n_embd=HIDDEN, n_layer=3, n_head=2, n_positions=64)
    )  # fmt: skip
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype)


def batch(side: str, prompts: list[list[int]] = PROMPTS) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), longest, dtype=torch.long), torch.zeros(len(prompts), longest).long()
    for i, prompt in enumerate(prompts):
        span = slice(longest - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[i, span], mask[i, span] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}
