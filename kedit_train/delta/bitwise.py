"""Compare and hash tensors by their bit patterns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from kedit_train.safetensors_file import dtype_name, tensor_bytes

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """View a tensor as integers of the same width, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bit pattern."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 (hex) of the dtype, shape and bytes of a CPU tensor."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def fingerprint_of(hashes: Iterable[str]) -> str:
    """Return one SHA-256 (hex) for a whole model, computed from the hashes of its tensors.

    The fingerprint does not depend on the names of the tensors. Tensors with equal contents are counted once. So a
    model in memory, its state dict and its checkpoint have the same fingerprint, even if the checkpoint stores a tied
    weight twice.
    """
    return hashlib.sha256("\n".join(sorted(set(hashes))).encode()).hexdigest()
