"""Check before the training that the model has no dropout, and that only a new LoRA adapter is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kedit_train.core.gate.adapted_layers import AdaptedLayers
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.evaluation_mode import evaluation_mode


def check_scope(run: EditRun, adapted: AdaptedLayers) -> None:
    """Check that the edit changes only the factors of the adapter, and that the base model has no dropout.

    Raises:
        EditError: another parameter is trained, the model is sharded, or the base model uses dropout.
    """
    if any(isinstance(parameter, DTensor) for parameter in run.model.parameters()):
        raise EditError(
            "a gate needs the whole model in each process, but the parameters of the model are sharded; use DDP."
        )
    own = {id(p) for layer in adapted.layers for p in layer.parameters()}
    own -= {id(p) for layer in adapted.layers for p in layer.base_layer.parameters()}  # type: ignore[union-attr, operator]
    for name, parameter in run.scope.items():
        if id(parameter) not in own:
            raise EditError(
                f"{name} is trained and is not a LoRA factor, so it would change the output for any input; freeze it, "
                "or select only adapted modules in ParameterScope."
            )
    model: Any = run.model.get_base_model()  # type: ignore[operator]
    config = model.config.get_text_config()
    dropout = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0 and ".lora_" not in n]
    if dropout or (getattr(config, "attention_dropout", 0.0) or 0.0) > 0:
        raise EditError(
            f"the base model must have no dropout, got {dropout[0] if dropout else 'attention_dropout'}. Hidden states "
            "with dropout do not match the keys of a gate; set the dropout in the model's configuration to 0."
        )


@torch.no_grad()
def check_no_randomness(run: EditRun, adapted: AdaptedLayers) -> None:
    """Check that the model computes the same hidden states in training and in evaluation mode.

    The check also finds dropout and noise that appear neither in the modules nor in the configuration, for example
    calls of ``F.dropout``. A resumed run is not checked again, because it was checked when it began.

    Raises:
        EditError: the hidden states differ.
    """
    if run.host.resumed:
        return
    device = next(run.model.parameters()).device
    ids = torch.arange(3, 35, device=device)[None] % run.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    devices = [] if device.type == "cpu" else [device]
    own = torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")
    with own, evaluation_mode(run.model), run.host.forward_context():
        evaluated = adapted.backbone(input_ids=ids, use_cache=False)[0]
        run.model.train()
        trained = adapted.backbone(input_ids=ids, use_cache=False)[0]
    if (trained - evaluated).norm() > 1e-3 * evaluated.norm():
        raise EditError(
            f"the hidden states of {type(adapted.backbone).__name__} differ between training and evaluation mode, so "
            "they do not match the keys of a gate; set every dropout and noise in the model's configuration to 0."
        )


def check_unused(run: EditRun, adapted: AdaptedLayers) -> None:
    """Check that the untrained adapter does not change the output of the model.

    A resumed run is not checked again, because it was checked when it began.

    Raises:
        EditError: a B factor is not zero.
    """
    if run.host.resumed:
        return
    for layer in adapted.layers:
        factors: dict[str, Tensor] = {
            n: p for n, p in layer.named_parameters() if "lora_B" in n or "lora_embedding_B" in n
        }
        for name, factor in factors.items():
            if bool(torch.count_nonzero(factor.detach())):
                raise EditError(
                    f"{name} is not zero, so the adapter already changes the model. A closed gate would undo this "
                    "change; start with a new LoRA adapter, and leave out init_lora_weights=."
                )
