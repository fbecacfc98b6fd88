"""Masks as a file: bool tensors by parameter name, in safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError

_DIGEST = "kedit_train.mask.sha256"


def save_masks(path: str | Path, masks: Mapping[str, Tensor]) -> Path:
    """Write masks with their checksum; the file is there whole or not at all."""
    path = Path(path)
    own = {name: mask.detach().cpu().contiguous() for name, mask in masks.items()}
    with writing(path) as unfinished:
        save_file(own, unfinished, metadata={_DIGEST: _digest(own)})
    return path


def load_masks(path: str | Path, shapes: Mapping[str, torch.Size] | None = None) -> dict[str, Tensor]:
    """Read masks, for parameters of these names and shapes where they are given.

    A file that somebody else wrote needs no checksum; one of ours has to agree with it.

    Raises:
        EditError: no such file, no safetensors file, changed since it was written; a tensor that is not bool, not in
            ``shapes`` or of another shape; or a name of ``shapes`` without one.
    """
    path = Path(path)
    if not path.is_file():
        raise EditError(f"GradientMask: no mask file {str(path)!r}; give the path that save_to= wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata, masks = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise EditError(f"GradientMask: {path} is no safetensors file, or a damaged one: {reason}") from error
    for name, mask in masks.items():
        if mask.dtype != torch.bool or bool((mask.view(torch.uint8) > 1).any()):
            kind = "bytes that are neither 0 nor 1" if mask.dtype == torch.bool else str(mask.dtype)
            raise EditError(f"GradientMask: {path}: {name} holds {kind}; a mask holds bools, true where to train")
    if _DIGEST in metadata and metadata[_DIGEST] != _digest(masks):
        raise EditError(f"GradientMask: {path} is not as it was written (checksum); write it again with save_to=")
    if shapes is None:
        return masks
    unknown, missing = sorted(masks.keys() - shapes.keys()), sorted(shapes.keys() - masks.keys())
    if unknown or missing:
        name, what = (unknown[0], "is not in the scope") if unknown else (missing[0], "has no mask in it")
        more = f" (and {len(unknown + missing) - 1} more)" if len(unknown + missing) > 1 else ""
        raise EditError(f"GradientMask: {path}: {name}{more} {what}; give ParameterScope what the mask was made for")
    for name, mask in masks.items():
        if mask.shape != shapes[name]:
            raise EditError(
                f"GradientMask: {path}: {name} is {list(mask.shape)} there and {list(shapes[name])} in the model; "
                "the mask was made for another model"
            )
    return masks


def _digest(masks: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name} {list(masks[name].shape)}\n".encode())
        digest.update(masks[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
