"""A context manager that puts a model into evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kedit_train.quantized_layers import PackingGuard


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: put every module into evaluation mode, and restore the previous modes at the end.

    In evaluation mode, bitsandbytes may pack 4-bit layers for faster inference on a CPU. Packed layers compute no
    gradients, not even in later training steps. This context manager prevents the packing.
    """
    packing = PackingGuard(model)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        packing.remove()
        # In autocast, older versions of torch, such as 2.6, keep the converted weights of a forward pass without
        # gradients. The next training step would use these weights, and would compute no gradients for them.
        torch.clear_autocast_cache()
