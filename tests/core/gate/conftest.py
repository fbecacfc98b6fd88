"""The gated models of these tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core.gate.adapted_models import CUT, IDS, LAYER, adapted, key_of

from kedit_train.core.gate.gate import Gate


@pytest.fixture(params=["llama", "qwen3", "gemma3", "gpt2"])
def models(request: Any, tiny: Any) -> tuple[Any, Any, Gate]:
    """A model, the same model with an adapter and a gate that opens at position 3 of row 0, and the gate."""
    gpt2 = request.param == "gpt2"
    base = tiny(request.param, **{"n_layer" if gpt2 else "num_hidden_layers": 3}).eval()
    model = adapted(copy.deepcopy(base), ("c_proj", "c_attn") if gpt2 else ("down_proj", "q_proj"), fan_in_fan_out=gpt2)
    gate = Gate(key_of(base, IDS[0], CUT), torch.tensor([1e-3]), LAYER)
    gate.install(model)
    return base, model, gate
