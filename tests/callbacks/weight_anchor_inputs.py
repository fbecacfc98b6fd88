"""Texts, examples and a substitute for training, for the tests of WeightAnchor."""

from __future__ import annotations

from typing import Any

import torch

from kedit_train.data.tokenization import Encoded

TEXTS = ["w1 w2 w3 w4 w5", "w9 w8", "w20 w21 w22 w23 w24 w25 w26"]
DOWN = "model.layers.1.mlp.down_proj.weight"


def examples_of(words: Any) -> list[Encoded]:
    """Return the texts as examples in which every token but the first is scored."""
    return [Encoded(words(text)["input_ids"], 1) for text in TEXTS]


def move(edit: Any, size: float = 0.1) -> None:
    """Move the weights at random, in place of training."""
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    # The run would refuse a change that no optimizer step has made.
    edit.run.steps.integrity.record_scope()
