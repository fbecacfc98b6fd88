"""Find the layers of a model that have a LoRA adapter, and the decoder blocks that contain them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from kedit_train.core.scope.blocks import place_in_blocks
from kedit_train.errors import EditError

# The variants of LoRA in PEFT that were tested with a gate.
_VARIANTS = ("DoraLinearVariant",)


@dataclass(frozen=True)
class AdaptedLayers:
    """Where a LoRA adapter acts in a causal language model.

    Attributes:
        backbone: the module that calls the decoder blocks.
        blocks: the decoder blocks.
        layers: the modules with an adapter, all of the class ``Linear`` of PEFT.
        first: the index of the first block with an adapter.
    """

    backbone: nn.Module
    blocks: nn.ModuleList
    layers: list[nn.Module]
    first: int


def find_adapted_layers(model: Any) -> AdaptedLayers:
    """Find the layers with a LoRA adapter.

    Args:
        model: a ``PeftModel`` with one LoRA adapter.

    Raises:
        EditError: the model does not have exactly one LoRA adapter, the adapter trains biases or whole modules, an
            adapted layer is outside of the decoder blocks, or a gate does not support the class of an adapted layer.
    """
    configs = getattr(model, "peft_config", None)
    if not configs or not hasattr(model, "get_base_model"):
        raise EditError(
            "a gate needs a model with a LoRA adapter; pass peft_config= to the trainer, lora= to EditModule, or wrap "
            "the model with get_peft_model."
        )
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if len(configs) != 1:
        raise EditError(f"a gate needs exactly one adapter, got {len(configs)} ({', '.join(configs)}); keep only one.")
    ((adapter, config),) = configs.items()
    if adapter != "default":
        # PEFT saves an adapter with another name in a subfolder, where the gate would not be found.
        raise EditError(f'the adapter must have the name "default", got {adapter!r}; leave out adapter_name=.')
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise EditError(f"a gate needs a LoRA adapter, got {kind}; use LoraConfig.")
    if getattr(config, "bias", "none") != "none":
        raise EditError(
            f'bias must be "none", got {config.bias!r}: trained biases would change answers even while the gate is '
            'closed; use LoraConfig(bias="none").'
        )
    inner = model.get_base_model()
    if hasattr(inner, "get_base_model"):
        raise EditError(
            "the model has one adapter around another, but a gate needs one adapter; load the base model, and add one "
            "adapter to it."
        )
    found: dict[str, Any] = {}
    for name, module in inner.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise EditError(
                f"{name} is trained without LoRA matrices, so it would change answers even while the gate is closed; "
                "remove modules_to_save and trainable_token_indices from the LoRA configuration."
            )
        if isinstance(module, BaseTunerLayer):
            _check_layer(name, module)
            found[name] = module
    places = [place_in_blocks(inner, name) for name in found]
    if not places or len({path for path, _ in places}) != 1:
        raise EditError(
            "every adapted layer must be inside the decoder blocks of the model; choose target_modules inside the "
            "blocks, such as down_proj."
        )
    path = places[0][0]
    blocks = inner.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    backbone = inner.get_submodule(path.rpartition(".")[0])
    return AdaptedLayers(backbone, blocks, list(found.values()), min(index for _, index in places))


def _check_layer(name: str, layer: Any) -> None:
    """Raise an error for every kind of layer that was not tested with a gate.

    A gate needs the unchanged output of the base layer. Many special layers of PEFT overwrite this output, or add the
    adapter to the weights of the base layer.
    """
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear:
        raise EditError(
            f"a gate works only with LoRA layers of the class lora.Linear, but {name} is a {type(layer).__module__}."
            f"{type(layer).__qualname__}; use LoRA on linear layers without quantization or target_parameters."
        )
    for variant in getattr(layer, "lora_variant", {}).values():
        kind = variant.__name__ if isinstance(variant, type) else type(variant).__name__
        if kind not in _VARIANTS:
            raise EditError(
                f"a gate works only with plain LoRA and DoRA, but {name} has the variant {kind}; remove the option "
                "that selects this variant from the LoRA configuration."
            )
