"""A hash of what a model computes: all weights, all buffers and the configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kedit_train.core.fsdp import full_tensor

# Entries of a configuration that do not change the forward pass.
_IRRELEVANT = (
    "_name_or_path",
    "base_model_name_or_path",
    "transformers_version",
    "dtype",
    "use_cache",
    "inference_mode",
)


@torch.no_grad()
def fingerprint(model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> str:
    """Hash the current weights, buffers and configuration of a model.

    The function copies one tensor at a time to the CPU and reads every byte. If the parameters are sharded, every
    process must call the function.

    Args:
        model: any module.
        dtypes: parameter name -> dtype to which the parameter is converted before hashing. By default, no parameter is
            converted. Example: a bf16 model was converted to fp32, and no value has changed since. If ``dtypes`` maps
            the converted parameters to bf16, the hash is that of the bf16 model.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = fingerprint(layer)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> fingerprint(layer) == before
        False
    """
    digest = hashlib.sha256()
    digest.update(f"{type(model).__name__} {_configuration(model)}".encode())
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(tensors):
        dtype = (dtypes or {}).get(name, tensors[name].dtype)
        value = full_tensor(tensors[name].detach()).to("cpu", dtype).contiguous()
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _configuration(model: Any) -> str:
    config = getattr(model, "config", None)
    parts: dict[str, Any] = {"attention": getattr(config, "_attn_implementation", None)}
    if config is not None:
        parts["config"] = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    # The scale of an adapter is stored only in its configuration.
    for name, adapter in getattr(model, "peft_config", {}).items():
        parts[f"adapter {name}"] = adapter.to_dict()
    return json.dumps(_relevant(parts), sort_keys=True, default=_to_json)


def _relevant(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = {str(k): v for k, v in value.items() if k not in _IRRELEVANT and not str(k).endswith("_token_id")}
    return {key: _relevant(item) for key, item in kept.items()}


def _to_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
