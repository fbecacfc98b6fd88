"""The second-order divergence and the preconditioned direction, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from kedit_train.functional.second_order import damped_inverse, precondition, second_order_divergence


def moment(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return vectors.T @ vectors / len(vectors)


S, A = moment(4, 0), moment(6, 1)
D = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_divergence_is_the_quadratic_form_of_the_kronecker_product() -> None:
    # With column-major vec: vec(S D A) = (A (x) S) vec(D).
    vector = D.T.flatten()
    expected = 0.5 * vector @ torch.kron(A, S) @ vector
    torch.testing.assert_close(second_order_divergence(D, S, A), expected)


def test_the_direction_solves_the_dense_system() -> None:
    damped = [m / m.diagonal().mean() + 0.1 * torch.eye(len(m), dtype=m.dtype) for m in (S, A)]
    expected = torch.linalg.solve(torch.kron(damped[1], damped[0]), D.T.flatten()).reshape(6, 4).T
    found = precondition(D, damped_inverse(S, 0.1), damped_inverse(A, 0.1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(precondition(D, None, damped_inverse(A, 0.1)), torch.linalg.solve(damped[1], D.T).T)


def test_no_other_direction_with_the_same_slope_has_less_divergence() -> None:
    """The direction minimizes the divergence among the changes with the same inner product with the gradient."""
    tiny = 1e-9
    best = precondition(D, damped_inverse(S, tiny), damped_inverse(A, tiny))
    least = second_order_divergence(best, S, A)
    for seed in range(20):
        other = best + 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = other * ((best * D).sum() / (other * D).sum())
        assert second_order_divergence(other, S, A) >= least


def test_a_large_damping_gives_the_gradient_and_the_scale_of_a_moment_does_not_matter() -> None:
    direction = precondition(D, damped_inverse(S, 1e6), damped_inverse(A, 1e6)) * 1e12
    torch.testing.assert_close(direction, D, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(damped_inverse(1e-8 * S, 0.1), damped_inverse(S, 0.1))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_moment_without_values_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="mean of the diagonal"):
        damped_inverse(torch.full((3, 3), value), 0.1)
