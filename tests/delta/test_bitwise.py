"""Bit patterns of tensors: comparison, hashes and fingerprints."""

from __future__ import annotations

import hashlib

import pytest
import torch

from kedit_train.delta.bitwise import bits, fingerprint_of, same_bits, tensor_hash


def test_nan_equals_itself_and_the_sign_of_zero_counts() -> None:
    nan = torch.tensor([torch.nan, 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize("other", [torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2), torch.zeros(3)], ids=str)
def test_another_dtype_or_shape_is_not_the_same(other: torch.Tensor) -> None:
    assert not same_bits(torch.zeros(4), other)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
def test_bits_share_the_memory_and_the_width(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, dtype=dtype)
    integers = bits(tensor)
    assert integers.data_ptr() == tensor.data_ptr()
    assert integers.element_size() == tensor.element_size()
    assert not integers.dtype.is_floating_point


def test_the_hash_is_the_sha256_of_dtype_shape_and_bytes() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert tensor_hash(tensor) == hashlib.sha256(b"uint8 [2, 2]\n" + bytes([1, 2, 3, 4])).hexdigest()
    assert tensor_hash(tensor.T) == hashlib.sha256(b"uint8 [2, 2]\n" + bytes([1, 3, 2, 4])).hexdigest()
    assert tensor_hash(tensor) != tensor_hash(tensor.view(4))


def test_a_fingerprint_ignores_order_and_repetition() -> None:
    assert fingerprint_of(["a", "b", "a"]) == fingerprint_of(["b", "a"])
    assert fingerprint_of(["a"]) != fingerprint_of(["a", "b"])
