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

# The number of values of each tensor that sample_fingerprint hashes.
_SAMPLES = 64


@torch.no_grad()
def fingerprint(model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> str:
    """Hash the current weights, buffers and configuration of a model.

    The function copies one tensor at a time to the CPU and reads every byte. If the parameters are sharded, every
    process must call the function.

    Args:
        model: any module.
        dtypes: parameter name -> dtype to which the parameter is converted before hashing. By default, no parameter is
            converted. For a model that was converted from bf16 to fp32, map each converted parameter to bf16. Then the
            hash is the same as before the conversion, unless a value has changed.

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


@torch.no_grad()
def sample_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash the names, the shapes and up to 64 evenly spaced values of each tensor.

    This function is much faster than :func:`fingerprint`. The hash still differs between models that were trained
    differently. The values are rounded to bf16 first, so a model has the same hash in fp32 and in bf16. If a tensor is
    sharded, every process must call the function.

    Args:
        tensors: name -> tensor.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> sample_fingerprint(layer.state_dict()) == sample_fingerprint(layer.to(torch.bfloat16).state_dict())
        True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = full_tensor(tensors[name].detach()).reshape(-1)
        digest.update(f"\n{name} {tuple(tensors[name].shape)} ".encode())
        if flat.numel() and not flat.is_meta:
            values = flat[:: -(-flat.numel() // _SAMPLES)].to("cpu", torch.bfloat16).contiguous()
            digest.update(values.view(torch.uint8).numpy().data)
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
