"""Tiny models, batches and a loop for the tests of PrefixCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from kedit_train.callbacks import ParameterScope, editing

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
STILL = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
KINDS = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**BASE),
    "qwen3": lambda: Qwen3Config(**BASE, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**BASE, head_dim=8, sliding_window=4, layer_types=KINDS),
    "gpt2": lambda: GPT2Config(**GPT2, **STILL),
    "mistral": lambda: MistralConfig(**BASE, sliding_window=4),
}
LENGTHS = [12, 5, 7, 9, 3, 12, 10, 4]


def build(family: str = "llama", **config: Any) -> Any:
    torch.manual_seed(0)
    made = FAMILIES[family]()
    for name, value in config.items():
        setattr(made, name, value)
    return AutoModelForCausalLM.from_config(made).train()


def batch(
    side: str = "right", width: int = 12, rows: slice = slice(None), positions: bool = False
) -> dict[str, Tensor]:
    """Return sequences of LENGTHS tokens; their first tokens are not supervised."""
    content = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(1))
    ids, mask = torch.zeros(8, width, dtype=torch.long), torch.zeros(8, width, dtype=torch.long)
    for i, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[i, where], mask[i, where] = content[i, :length], 1
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if positions:
        made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return {name: value[rows] for name, value in made.items()}


HALVES = [slice(0, 4), slice(4, 8)]


def train(model: Any, callbacks: list[Any], batches: list[Any], epochs: int = 3, **options: Any) -> tuple[Any, ...]:
    """Train and return three values: the losses, the weights and the history."""
    losses = []
    with editing(model, callbacks, log_every_n_steps=1, **options) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        for inputs in batches * epochs:
            edit.before_step()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()], edit.history


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    weights = all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a[1], b[1], strict=True))
    return a[0] == b[0] and weights


def rates(history: list[dict[str, float]]) -> list[float]:
    return [row["edit/cache/hit_rate"] for row in history]


def scope(layers: Any = 3) -> ParameterScope:
    return ParameterScope(layers, modules="mlp")
