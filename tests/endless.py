"""A model that never ends its answers."""

from __future__ import annotations

from typing import Any

import torch


def endless(model: Any, tokenizer: Any) -> Any:
    """Make a model that never predicts end-of-text."""
    eos = torch.tensor(tokenizer.eos_token_id)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output.index_fill(-1, eos, -1e4))
    return model
