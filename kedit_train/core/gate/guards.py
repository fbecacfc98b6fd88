"""Check that a gate switches the adapter on and off, and raise errors for calls that would lose the gate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kedit_train.core.gate.adapted_layers import AdaptedLayers
from kedit_train.core.gate.gate_file import save_gate
from kedit_train.core.state import RunState
from kedit_train.errors import EditError
from kedit_train.evaluation_mode import evaluation_mode

# The attribute of the base model in which its gate is stored.
GATE = "_kedit_gate"
# The methods of the LoRA model that merge or remove the adapter.
_MERGING = ("merge_adapter", "merge_and_unload", "unload")
# The method of the PeftModel and of the LoRA model that removes an adapter by its name.
_DELETE = "delete_adapter"
# The method of the LoRA model that adds the hooks for the argument adapter_names= of a forward call.
_NAMES = "_enable_peft_forward_hooks"
NO_NAMES = (
    "adapter_names= cannot be used with a gate, because the gate decides in which rows the adapter acts; leave "
    "adapter_names= out."
)
ALREADY_GATED = (
    "the model already has an adapter with a gate (GatedAdapter), so it cannot be edited again; load the base model "
    "and train all edits in one run."
)


def find_gate(model: Any) -> Any:
    """Return the gate that is installed on a model, or None. The model may be wrapped in several PEFT models."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return getattr(model, "__dict__", {}).get(GATE)


def check_not_gated_before(run: RunState) -> None:
    """Raise an error if a new run begins on a model that already has a gate.

    The existing gate would switch the adapter off for some inputs, and these inputs would give the adapter no gradient.
    A resumed run is not checked, because it replaces the existing gate.

    Raises:
        EditError: the model has a gate.
    """
    if not run.host.resumed and find_gate(run.model) is not None:
        raise EditError(ALREADY_GATED, component=type(run.callbacks[0]).__name__)


def check_not_gated_and_frozen(run: RunState) -> None:
    """Raise an error if the model has a gate and all parameters are frozen.

    A gated adapter is frozen when it is loaded, so there would be nothing to train. The model of an interrupted run
    also has a gate, but no error is raised, because its adapter is not frozen.

    Raises:
        EditError: the model has a gate, and none of its parameters requires gradients.
    """
    if find_gate(run.model) is not None and not any(p.requires_grad for p in run.model.parameters()):
        raise EditError(ALREADY_GATED)


@torch.no_grad()
def check_switches(gate: Any, adapted: AdaptedLayers) -> None:
    """Check that each adapted layer returns the output of its base layer only where the gate is closed.

    The check detects versions of PEFT with which the gate does not work. It calls each layer with a random input at two
    positions. The gate is closed at the first position and open at the second. A new adapter would not change the
    output, because its B factor is zero. For this call, the check therefore replaces both factors by random values.
    The weights of the adapter do not change.

    Args:
        gate: a :class:`~kedit_train.core.gate.gate.Gate` whose hooks are installed.
        adapted: the adapted layers of the gated model.

    Raises:
        EditError: a layer returns the wrong output at one of the two positions.
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
                f"the gate does not switch the output of {type(own).__name__} between the base layer and the adapter "
                f"(peft {peft.__version__}); make sure that the adapter is enabled, or use another version of peft."
            )


def guard(model: Any) -> None:
    """Replace methods of a gated model, so that the gate is saved with the adapter and cannot be lost.

    ``save_pretrained`` then also saves the gate. Calls that merge or delete the adapter, add a second adapter, or pass
    ``adapter_names=`` raise an error.

    Args:
        model: a ``PeftModel`` with a gate. :func:`unguard` restores its methods.
    """
    model.__dict__["save_pretrained"] = partial(_save_pretrained, model)
    for name in _MERGING:
        model.base_model.__dict__[name] = _refuse_merging
    model.__dict__["add_adapter"] = _refuse_second_adapter
    model.__dict__[_DELETE] = model.base_model.__dict__[_DELETE] = _refuse_deleting
    if hasattr(model.base_model, _NAMES):
        model.base_model.__dict__[_NAMES] = partial(_hooks_without_names, model.base_model)


def unguard(model: Any) -> None:
    """Restore the methods that :func:`guard` has replaced."""
    for name in ("save_pretrained", "add_adapter", _DELETE):
        model.__dict__.pop(name, None)
    for name in (*_MERGING, _DELETE, _NAMES):
        model.base_model.__dict__.pop(name, None)


def _save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save the adapter with PEFT, and the gate next to it."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    gate = model.get_base_model().__dict__.get(GATE)
    if gate is not None and kwargs.get("is_main_process", True):
        save_gate(gate, save_directory)


def _hooks_without_names(model: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("adapter_names") is not None:
        # PEFT has not added its hooks yet, so no hook stays on the model after this error.
        raise EditError(NO_NAMES)
    return getattr(type(model), _NAMES)(model, *args, **kwargs)


def _refuse_second_adapter(*args: Any, **kwargs: Any) -> None:
    raise EditError("a gated model has exactly one adapter; load the base model again for another adapter.")


def _refuse_deleting(*args: Any, **kwargs: Any) -> None:
    raise EditError(
        "the adapter of a gated model cannot be deleted, because its gate would stay; remove the gate first "
        "(GatedAdapter.gate.remove()), or load the base model again."
    )


def _refuse_merging(*args: Any, **kwargs: Any) -> None:
    raise EditError(
        "a gated adapter acts on some inputs only, so it cannot be merged into the weights or unloaded; remove the "
        "gate first (GatedAdapter.gate.remove()), or load the adapter without its gate (PeftModel.from_pretrained)."
    )
