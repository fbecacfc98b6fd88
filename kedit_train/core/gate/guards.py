"""Check that a gate switches its layers, and let a gated model refuse what would lose the gate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kedit_train.core.gate.adapted_layers import AdaptedLayers
from kedit_train.core.gate.gate_file import save_gate
from kedit_train.errors import EditError
from kedit_train.evaluation_mode import evaluation_mode

# The attribute of the base model in which its gate is stored.
GATE = "_kedit_gate"
# The methods of the LoRA model that merge or remove the adapter.
_MERGING = ("merge_adapter", "merge_and_unload", "unload")


@torch.no_grad()
def check_switches(gate: Any, adapted: AdaptedLayers) -> None:
    """Check for every adapted layer that the gate switches its output: base layer if closed, with adapter if open.

    Each layer reads one row of two random positions, with the gate closed at the first and open at the second. Random
    factors replace those of the adapter in this call, because the B factor of a new adapter is zero. No weight is
    changed. A later release of PEFT may compute the output in another way. This check then raises an error.

    Args:
        gate: a :class:`~kedit_train.core.gate.gate.Gate` whose hooks are installed.
        adapted: the adapted layers of its model.

    Raises:
        EditError: the gate does not switch a layer.
    """
    generator = torch.Generator().manual_seed(0)

    def random(shape: Any, like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    for layer in adapted.layers:
        own: Any = layer
        weight = own.base_layer.weight
        if weight.is_meta:
            continue  # Offloaded weights are loaded only inside the forward pass of the model.
        inputs = random((1, 2, own.in_features), weight)
        named = {name: p for name, p in own.named_parameters() if name.startswith(("lora_A.", "lora_B."))}
        factors: dict[str, Tensor] = {
            name: nn.Parameter(random(p.shape, p), requires_grad=False) for name, p in named.items()
        }
        with evaluation_mode(own), gate.opened_at(torch.tensor([[False, True]], device=weight.device)):
            output = functional_call(own, factors, (inputs,))
            base = own.base_layer(inputs)
        if not torch.equal(output[:, 0], base[:, 0]) or torch.equal(output[:, 1], base[:, 1]):
            import peft

            raise EditError(
                f"the gate does not switch the output of {type(own).__name__} (peft {peft.__version__}), so it would "
                "have no effect; use another version of peft, and make sure that the adapter is enabled."
            )


def guard(model: Any) -> None:
    """Let a gated model save its gate together with the adapter, and raise an error if the adapter would be merged.

    Args:
        model: a ``PeftModel`` with a gate. :func:`unguard` removes what this function adds to it.
    """
    model.__dict__["save_pretrained"] = partial(_save_pretrained, model)
    for name in _MERGING:
        model.base_model.__dict__[name] = _refuse_merging


def unguard(model: Any) -> None:
    """Remove what :func:`guard` added to a model."""
    model.__dict__.pop("save_pretrained", None)
    for name in _MERGING:
        model.base_model.__dict__.pop(name, None)


def _save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save the adapter with PEFT, and the gate next to it."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    gate = model.get_base_model().__dict__.get(GATE)
    if gate is not None and kwargs.get("is_main_process", True):
        save_gate(gate, save_directory)


def _refuse_merging(*args: Any, **kwargs: Any) -> None:
    raise EditError(
        "a gated adapter acts on some inputs only, so it cannot be merged into the weights or unloaded; remove the "
        "gate first (remove() of the attribute gate of GatedAdapter), or load the base model."
    )
