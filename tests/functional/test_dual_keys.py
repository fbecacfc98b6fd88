"""Dual keys, against their definition."""

from __future__ import annotations

import pytest
import torch

from kedit_train.functional.dual_keys import DampedMoment, distinctness, dual_keys

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 6, generator=GENERATOR, dtype=torch.float64) * torch.arange(1, 7)
MOMENT = INPUTS.T @ INPUTS / len(INPUTS)
KEYS = torch.randn(3, 6, generator=GENERATOR, dtype=torch.float64)


def test_a_dual_key_has_the_product_one_with_its_own_key_and_zero_with_the_others() -> None:
    products = dual_keys(KEYS, DampedMoment(MOMENT, 0.1))[0] @ KEYS.T
    torch.testing.assert_close(products, torch.eye(3, dtype=torch.float64), rtol=0, atol=0.02)


def test_no_vector_with_the_same_products_is_smaller_on_the_texts() -> None:
    damped = MOMENT / MOMENT.diagonal().median() + 0.1 * torch.eye(6, dtype=torch.float64)
    found, _ = dual_keys(KEYS, DampedMoment(MOMENT, 0.1))
    # Changes that keep the products with all keys: what remains after the keys are projected out.
    free = torch.eye(6, dtype=torch.float64) - KEYS.T @ torch.linalg.solve(KEYS @ KEYS.T, KEYS)
    for _ in range(20):
        other = found + 0.1 * torch.randn(3, 6, generator=GENERATOR, dtype=torch.float64) @ free
        torch.testing.assert_close(other @ KEYS.T, found @ KEYS.T)
        for a, b in zip(found, other, strict=True):
            assert a @ damped @ a < b @ damped @ b


def test_the_changes_are_the_norms_of_the_dual_keys_on_the_texts() -> None:
    found, changes = dual_keys(torch.cat([KEYS, torch.zeros(1, 6)]), DampedMoment(MOMENT, 0.1))
    damped = MOMENT + 0.1 * MOMENT.diagonal().median() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(changes[:3], torch.einsum("ni,ij,nj->n", found, damped, found)[:3].sqrt())
    assert bool(found[3].eq(0).all())
    assert 0.0 < float(changes[3]) < 1e-12


def test_equal_keys_share_a_dual_key() -> None:
    twice = torch.stack([KEYS[0], KEYS[0], KEYS[1]])
    found, _ = dual_keys(twice, DampedMoment(MOMENT, 0.1))
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0] @ KEYS[0]) == pytest.approx(0.5, abs=0.01)
    assert float(found[0] @ KEYS[1]) == pytest.approx(0.0, abs=0.01)


def test_with_a_large_damping_they_are_the_pseudoinverse() -> None:
    found, _ = dual_keys(KEYS, DampedMoment(MOMENT, 1e6))
    torch.testing.assert_close(found, torch.linalg.pinv(KEYS).T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("keys", "moment", "expected"),
    [(KEYS, torch.zeros(6, 6), "moment must be > 0 and finite"), (torch.zeros(2, 6), MOMENT, "all keys are zero")],
)
def test_zeros_are_an_error(keys: torch.Tensor, moment: torch.Tensor, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        dual_keys(keys, DampedMoment(moment, 0.1))


def test_the_mean_distinctness_of_the_inputs_on_the_texts_is_one() -> None:
    found = distinctness(INPUTS, DampedMoment(MOMENT, 1e-9))
    damped = MOMENT + 1e-9 * MOMENT.diagonal().median() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found, torch.einsum("ti,ij,tj->t", INPUTS, damped.inverse(), INPUTS) / 6)
    assert float(found.mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(distinctness(INPUTS, DampedMoment(MOMENT, 1.0)).mean()) < 1.0
