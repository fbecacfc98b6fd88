"""Write and read masks: one bool tensor per parameter name, in a safetensors file with a checksum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kedit_train.errors import EditError, warn
from kedit_train.safetensors_file import load_tensors, save_tensors

_KIND = "kedit_train.mask"


def save_masks(path: str | Path, masks: Mapping[str, Tensor], model: str | None = None) -> Path:
    """Write masks to a file atomically, with a checksum.

    Args:
        path: path of the file.
        masks: name -> bool tensor.
        model: a fingerprint of the model for which the masks were made. :func:`load_masks` warns if the masks are
            loaded for a model with another fingerprint. None stores no fingerprint.

    Raises:
        EditError: the file cannot be written.
    """
    return save_tensors(path, masks, None if model is None else {"model": model}, kind=_KIND)


def load_masks(
    path: str | Path,
    shapes: Mapping[str, torch.Size] | None = None,
    model: Callable[[Mapping[str, Tensor]], str] | None = None,
) -> dict[str, Tensor]:
    """Read masks and check that they fit the scope. Warn if they were made for another model.

    A file without a checksum is also accepted, so that other programs can write masks.

    Args:
        path: path of a safetensors file with one bool tensor per parameter.
        shapes: name -> shape of every parameter in the scope. None skips the comparison.
        model: function that takes the loaded masks and returns the fingerprint of the current model. From the masks,
            the function knows which entries are frozen. If ``model`` is None or the file contains no fingerprint, the
            models are not compared.

    Returns:
        name -> bool tensor.

    Raises:
        EditError: the file is missing, is damaged or was changed after it was written. The error is also raised if a
            mask is not bool, if it does not have the shape of its parameter, or if the file and ``shapes`` do not have
            the same names.
    """
    masks, metadata = load_tensors(path, kind=_KIND, memory_map=False, allow_unsigned=True)
    for name, mask in masks.items():
        if not name.isprintable():
            raise EditError(
                f"{path}: {name!r} is not the name of a parameter; use a mask that was made for this model."
            )
        if mask.dtype != torch.bool or bool((mask.view(torch.uint8) > 1).any()):
            values = "bytes other than 0 and 1" if mask.dtype == torch.bool else str(mask.dtype)
            raise EditError(
                f"{path}: {name} must contain bools (True: the entry may change), got {values}; save it as torch.bool."
            )
    if shapes is None:
        return masks
    unknown, missing = sorted(masks.keys() - shapes.keys()), sorted(shapes.keys() - masks.keys())
    if unknown or missing:
        name = (unknown or missing)[0]
        problem = "has a mask in the file, but is not in the scope" if unknown else "has no mask in the file"
        more = f" (further mismatches: {len(unknown + missing) - 1})" if len(unknown + missing) > 1 else ""
        raise EditError(f"{path}: {name} {problem}{more}; use the ParameterScope that the masks were made with.")
    for name, mask in masks.items():
        if mask.shape != shapes[name]:
            raise EditError(
                f"{path}: the mask of {name} must have the parameter's shape {list(shapes[name])}, got "
                f"{list(mask.shape)}; use a mask that was made for this model."
            )
    recorded = metadata.get("model") if isinstance(metadata, dict) else None
    if model is not None and recorded is not None and recorded != model(masks):
        warn(
            f"{path} was made for another model with the same shapes, so the mask may select the wrong entries; use "
            "the model that the mask was made for, or make a new mask."
        )
    return masks
