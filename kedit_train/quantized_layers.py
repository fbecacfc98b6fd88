"""Prevent bitsandbytes from packing 4-bit layers on a CPU, because packed layers pass no gradient to their input.

On a CPU with AVX512-BF16 instructions, ``bitsandbytes.nn.Linear4bit`` has a faster kernel for inference, which needs
packed weights. The layer packs its weights when it is first called in evaluation mode without gradients. From then on,
the layer always uses this kernel, also in training mode. The kernel passes no gradient to the input of the layer
(bitsandbytes 0.50), so LoRA factors in earlier layers get no gradient. If a residual connection bypasses the layer,
these LoRA factors get a wrong gradient, and no error is raised.
"""

from __future__ import annotations

from torch import nn

from kedit_train.errors import EditError

# The attribute of Linear4bit that permits the packing.
_PERMITS = "support_avx512bf16_for_cpu"


class PackingGuard:
    """Prevent bitsandbytes from packing 4-bit layers for inference until :meth:`remove` is called.

    Args:
        root: a module that contains the layers. If it contains no 4-bit layers of bitsandbytes, nothing is changed.
    """

    def __init__(self, root: nn.Module) -> None:
        self._layers = [module for module in root.modules() if module.__dict__.get(_PERMITS)]
        for module in self._layers:
            module.__dict__[_PERMITS] = False

    def remove(self) -> None:
        """Permit packing again."""
        for module in self._layers:
            module.__dict__[_PERMITS] = True
        self._layers = []


def check_not_packed(root: nn.Module) -> None:
    """Check that no 4-bit layer of a model is packed.

    This function does not unpack layers, because bitsandbytes cannot restore the quantization scales exactly.

    Raises:
        EditError: a layer is packed.
    """
    packed = next((name for name, module in root.named_modules() if _is_packed(module)), None)
    if packed is not None:
        raise EditError(
            f"the 4-bit weights of the layer {packed!r} must not be packed for CPU inference, because a packed layer "
            "passes no gradient to its input; load the model again and do not call it before the edit begins (a call "
            "without gradients packs the weights), or train on a GPU."
        )


def _is_packed(module: nn.Module) -> bool:
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))
