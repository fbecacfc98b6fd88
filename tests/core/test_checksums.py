"""Checksums of weights change with every entry, and do not depend on the process or on the order."""

from __future__ import annotations

import pytest
import torch

from kedit_train.core import checksums as checksums_module
from kedit_train.core.checksums import checksum, checksums, first_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (64, 128)])
def test_a_checksum_changes_with_every_entry(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    before = checksum(tensor)
    for position in {0, tensor.numel() // 2, tensor.numel() - 1}:
        changed = tensor.clone()
        entry = changed.view(-1)[position]
        changed.view(-1)[position] = not bool(entry) if dtype == torch.bool else entry + 1
        assert checksum(changed) != before
    assert checksum(tensor.clone()) == before
    assert checksum(tensor[1:]) == checksum(tensor[1:].clone())


@pytest.mark.parametrize("shape", [(8, 16), (300, 64), (129, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_depends_on_positions_and_on_pairs_of_signs(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    rows, columns = tensor.clone(), tensor.clone()
    rows[[1, 4]], columns[:, [2, 9]] = tensor[[4, 1]], tensor[:, [9, 2]]
    changed = [rows, columns, tensor.flip(0), tensor.flip(1), -tensor, tensor.roll(1)]
    for first, second in ((1, 3), (1, 1 + shape[1]), (3, 3 + 2 * shape[1]), (5, tensor.numel() - 1)):
        signs, swapped = tensor.clone().view(-1), tensor.clone().view(-1)
        signs[[first, second]] *= -1
        swapped[[first, second]] = swapped[[second, first]]
        changed += [signs.view(shape), swapped.view(shape)]
    for first, second in ((1, 3), (0, 5)):
        signs = tensor.clone()
        signs[[first, second]] *= -1
        changed.append(signs)
        signs = tensor.clone()
        signs[:, [first, second]] *= -1
        changed.append(signs)
    sums = checksums([tensor, *changed])
    assert len(set(sums)) == len(sums)


def test_checksums_are_the_same_in_every_process_and_order() -> None:
    tensors = [torch.arange(10.0), torch.arange(5000.0), torch.ones(7, dtype=torch.bfloat16), torch.empty(0)]
    assert checksums(tensors) == [int(checksum(tensor)) for tensor in tensors]
    assert checksums(tensors) == [5495020027684847616, -40224157479156590, -454399874279918187, 0]


def test_a_sum_that_overflows_is_finite() -> None:
    large = torch.full((100_000,), 60_000.0, dtype=torch.float16)
    assert first_not_finite([large]) is None
    large[-1] = torch.nan
    assert first_not_finite([torch.ones(3), large]) == 1


def test_checksums_do_not_depend_on_how_many_tensors_are_combined_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    tensors = [torch.randn(size) for size in (1, 3, 5000, 4, 9000, 2)]
    whole, groups, own = checksums(tensors), [], checksums_module._combine
    monkeypatch.setattr(checksums_module, "_WORDS_AT_ONCE", 20)
    monkeypatch.setattr(checksums_module, "_combine", lambda group: groups.append(len(group)) or own(group))
    assert checksums(iter(tensors)) == whole
    assert groups == [3, 2, 1]
    assert checksums([]) == []
