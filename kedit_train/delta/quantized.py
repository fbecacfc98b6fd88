"""Refuse a run that changes quantized weights. Its delta could not be applied to a checkpoint of the base model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kedit_train.delta.weight_source import Weights, named_tensors
from kedit_train.errors import EditError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_not_quantized(model: nn.Module, weights: Weights, scope: Mapping[str, nn.Parameter]) -> None:
    """Check that the run changes no quantized weight. Other weights of the model may be quantized.

    Args:
        model: the model before the edit.
        weights: the weights of this model.
        scope: the parameters that the run trains. If the run trains a PEFT adapter, it changes the weights into which
            the adapter can be merged.

    Raises:
        EditError: the run changes a quantized weight.
    """
    trained = {id(parameter) for parameter in scope.values()}
    tensors = {id(tensor): tensor for tensor in named_tensors(model).values()}
    for name in weights:
        parts = weights.made_of[name]
        found = next((tensors[p] for p in parts if p in tensors and _is_quantized(tensors[p])), None)
        if parts & trained and found is not None:
            raise EditError(
                f"{name} is quantized ({str(found.dtype).removeprefix('torch.')}), so its delta could not be applied "
                "to the checkpoint of the base model; load the model without quantization, or remove SaveDelta and "
                "save the adapter with PEFT."
            )


def _is_quantized(tensor: Tensor) -> bool:
    wrapped = is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)
    return wrapped or tensor.dtype not in _DTYPES
