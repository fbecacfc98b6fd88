"""A small model with a LoRA adapter, a key of its gate, and token ids."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

LAYER, CUT = 1, 3  # The gate reads the inputs of block 1; the key is the state at position 3 of row 0.
IDS = torch.tensor([[5, 7, 11, 13, 17, 3], [2, 4, 8, 16, 32, 60], [9, 7, 11, 13, 17, 3]])


def adapted(base: Any, modules: Any = ("down_proj", "q_proj"), **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 32, "target_modules": list(modules), "layers_to_transform": [1, 2]}
    model = get_peft_model(base, LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def key_of(base: Any, ids: Tensor, position: int) -> Tensor:
    with torch.no_grad():
        return base(input_ids=ids[None], output_hidden_states=True).hidden_states[LAYER][0, position][None]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits
