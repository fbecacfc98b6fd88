"""What a model computes, as one hash: every weight and buffer by content, and the configuration beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kedit_train.core.fsdp import full_tensor

# Of a configuration, what says where a model came from or how it generates, not what its forward pass computes.
_BESIDE = ("_name_or_path", "base_model_name_or_path", "transformers_version", "dtype", "use_cache", "inference_mode")


@torch.no_grad()
def fingerprint(model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> str:
    """Hash (SHA-256, hex) a model as it is now.

    Every byte of every weight is read: about a second for each GB (0.94 GB/s measured on one core), one tensor at a
    time on the CPU. With sharded parameters every process has to call this.

    Args:
        dtypes: name -> the dtype that a parameter is to be hashed in (one that is trained in fp32 and was widened
            exactly is the same model).
    """
    digest = hashlib.sha256()
    digest.update(f"{type(model).__name__} {_configuration(model)}".encode())
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(tensors):
        value = (
            full_tensor(tensors[name].detach()).to("cpu", (dtypes or {}).get(name, tensors[name].dtype)).contiguous()
        )
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _configuration(model: Any) -> str:
    config = getattr(model, "config", None)
    parts: dict[str, Any] = {"attention": getattr(config, "_attn_implementation", None)}
    if config is not None:
        parts["config"] = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    # A factor's scale is in no tensor.
    for name, adapter in getattr(model, "peft_config", {}).items():
        parts[f"adapter {name}"] = adapter.to_dict()
    return json.dumps(_without(parts), sort_keys=True, default=_plain)


def _without(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = {str(k): v for k, v in value.items() if k not in _BESIDE and not str(k).endswith("_token_id")}
    return {key: _without(item) for key, item in kept.items()}


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
