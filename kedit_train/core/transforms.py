"""Raise an error inside function transforms of torch, because the hooks of a run do not work there."""

from __future__ import annotations

import torch

from kedit_train.errors import EditError

# torch has no public function for this check.
_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def check_no_transform() -> None:
    """Raise an error if the model is called inside ``torch.func.grad``, ``vmap`` or another function transform."""
    if not torch.compiler.is_compiling() and _is_active():
        raise EditError(
            "the model was called inside a transform of torch.func (grad, vmap, jvp, ...), where the loss and the "
            "hidden states cannot be read; compute the gradient with loss.backward() or torch.autograd.grad."
        )
