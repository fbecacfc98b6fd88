"""The second-order divergence and the coordinates that it defines, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from kedit_train.functional.second_order import inverse_root, second_order_divergence, transform


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


def test_the_root_is_symmetric_and_its_square_is_the_inverse_of_the_damped_moment() -> None:
    root = inverse_root(A, 0.1)
    damped = A / A.diagonal().mean() + 0.1 * torch.eye(6, dtype=A.dtype)
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ root @ damped, torch.eye(6, dtype=A.dtype))


def test_half_the_squared_norm_of_transformed_coordinates_is_the_divergence() -> None:
    roots = inverse_root(S, 1e-12), inverse_root(A, 1e-12)
    scale = float(S.diagonal().mean() * A.diagonal().mean())
    expected = 0.5 * D.square().sum() * scale
    torch.testing.assert_close(second_order_divergence(transform(D, *roots), S, A), expected)
    torch.testing.assert_close(transform(D, None, roots[1]), D @ roots[1])


def test_the_transformed_gradient_is_the_gradient_in_these_coordinates() -> None:
    roots = inverse_root(S, 0.1), inverse_root(A, 0.1)
    coordinates = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    (transform(coordinates, *roots) * D).sum().backward()
    torch.testing.assert_close(coordinates.grad, transform(D, *roots))


def test_no_other_direction_with_the_same_slope_has_less_divergence() -> None:
    """The direction minimizes the divergence among the changes with the same inner product with the gradient."""
    tiny = 1e-9
    roots = inverse_root(S, tiny), inverse_root(A, tiny)
    best = transform(transform(D, *roots), *roots)
    least = second_order_divergence(best, S, A)
    for seed in range(20):
        other = best + 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = other * ((best * D).sum() / (other * D).sum())
        assert second_order_divergence(other, S, A) >= least


def test_a_large_damping_gives_the_gradient_and_the_scale_of_a_moment_does_not_matter() -> None:
    same = transform(D, inverse_root(S, 1e6), inverse_root(A, 1e6)) * 1e6
    torch.testing.assert_close(same, D, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inverse_root(1e-8 * S, 0.1), inverse_root(S, 0.1))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_moment_without_values_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="mean of the diagonal of the second moment"):
        inverse_root(torch.full((3, 3), value), 0.1)
