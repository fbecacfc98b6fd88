"""Texts and the penalty at fixed changed weights, for the tests of KLLocality."""

from __future__ import annotations

from typing import Any

import torch

from kedit_train.callbacks import KLLocality, ParameterScope, editing

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30", "w7 w7 w7", "w50 w40 w30 w20"]
TOKENS = 24


def value(
    model: Any, words: Any, scope: Any = 1, texts: Any = TEXTS, **options: Any
) -> tuple[float, int, dict[str, Any]]:
    """Return the penalty at fixed changed weights, the forward passes of the reference model, and the metrics."""
    kl = KLLocality(texts, weight=1.0, batch_size=len(texts), **options)
    passes: list[int] = []
    with editing(model, [kl, ParameterScope(scope)], tokenizer=words) as edit:
        edit.run.head()
        handle = model.register_forward_pre_hook(lambda m, a: passes.append(1))
        for callback in edit.run.callbacks:
            edit.run.attach(callback)
        handle.remove()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in edit.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
        penalty = kl.penalty(edit.run)
        assert penalty is not None
        return penalty.item(), len(passes), kl.metrics(edit.run)
