"""Find the input directions that a weight change must not affect, and remove them from the change.

For a linear layer ``y = W k``, a weight change D does not change the outputs for the inputs K0 if ``D K0 = 0``.
AlphaEdit applies this to a closed-form update, and selects directions by an absolute threshold on singular values. This
module selects the directions that contain a given fraction of the trace of the inputs' second moment. Such a fraction
is comparable between models and layers.

The whole difference from the original weights must be projected. If only the gradient is projected, the step leaves the
null space, because Adam rescales each entry of the projected gradient.

References:
    "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", arXiv 2410.02355.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_train.functional.precision import full_precision, widest

# Number of vectors in the sketch of a gradient. If the last _SPARE of these vectors are linear combinations of the
# others, the gradient has a low rank.
_SKETCH, _SPARE = 64, 8
# A vector counts as a linear combination of others if its part outside of their span has at most this relative size. In
# fp32, rounding alone gives a relative size of about 1e-7.
_ROUNDING = 1e-6


def principal_directions(
    moment: Tensor, *, energy: float = 0.99, rank: int | None = None, start: Tensor | None = None
) -> Tensor:
    """Return the orthonormal directions that contain most of the trace of a second moment.

    Args:
        moment: [d, d], the second moment E[k kᵀ] of vectors k, symmetric.
        energy: minimum fraction of the trace that the directions contain, in (0, 1]. 1 takes every direction with
            an eigenvalue above the rounding error of the moment (``d * eps`` times the greatest eigenvalue).
        rank: upper bound of the rank of the moment, for example the number of vectors k. If the bound is at most d / 2,
            the directions are computed in the column space of the moment. This takes about ``4 d² rank`` operations
            instead of about ``10 d³``.
        start: [d, s], the result of this function for a similar moment. If s is below d / 4, one step of subspace
            iteration from ``start`` approximates the directions in about ``4 d² s`` operations. If the approximate
            directions contain too little of the trace, the exact directions are computed.

    Returns:
        [d, r] in fp64, sorted by descending eigenvalue.
    """
    moment_wide = widest(moment)
    trace = float(moment_wide.trace())
    if start is not None and 0 < 4 * start.shape[1] < len(moment):
        values, vectors = _eigenvectors_near(moment_wide, start)
        if float(values.sum()) >= energy * trace > 0.0:
            return vectors[:, : _fewest(values, energy * trace)]
    values, vectors = _eigenvectors(moment_wide, rank)
    values, vectors = values.flip(0), vectors.flip(1)
    known = int((values > values[0] * len(moment) * torch.finfo(moment.dtype).eps).sum())
    return vectors[:, : min(_fewest(values[:known], energy * float(values[:known].sum())), known)]


def _fewest(values: Tensor, energy: float) -> int:
    """Return how many of the largest values are needed for a sum of at least ``energy``."""
    return int((values.cumsum(0) < energy * (1.0 - 1e-12)).sum()) + 1


def _eigenvectors_near(moment: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return approximate eigenvalues (descending) and eigenvectors from one step of subspace iteration."""
    # The random vectors find directions of ``moment`` that ``start`` does not contain.
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(len(moment), start.shape[1] // 4 + 16, generator=generator, dtype=moment.dtype)
    values, vectors = _eigenvectors_in_span(moment, torch.cat([start.to(moment), random.to(moment.device)], dim=1))
    return values.flip(0), vectors.flip(1)


def _eigenvectors(moment: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors of ``moment``, sorted by ascending eigenvalue.

    If ``rank`` is at most half of the size, only eigenvectors in the column space of ``moment`` are computed.
    """
    size = len(moment)
    if rank is None or 2 * rank > size:
        return torch.linalg.eigh(moment)
    # The products of the moment with ``rank`` random vectors span its column space. A few more vectors make this robust
    # against rounding errors.
    random = torch.randn(size, min(rank + 8, size), generator=torch.Generator().manual_seed(0), dtype=moment.dtype)
    return _eigenvectors_in_span(moment, random.to(moment.device))


def _eigenvectors_in_span(moment: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (ascending) and eigenvectors of ``moment`` in the column space of ``moment @ vectors``."""
    span = torch.linalg.qr(moment @ vectors)[0]
    values, within = torch.linalg.eigh(span.T @ moment @ span)
    return values, span @ within


def join_directions(first: Tensor, second: Tensor) -> Tensor:
    """Return orthonormal directions that together span both sets of directions.

    Args:
        first: [d, r1], orthonormal.
        second: [d, r2], orthonormal.

    Returns:
        [d, r] with r at most r1 + r2.
    """
    residual = second - first @ (first.T @ second)
    residual = residual - first @ (first.T @ residual)
    left, sizes, _ = torch.linalg.svd(residual, full_matrices=False)
    return torch.cat([first, left[:, sizes > 1e-6]], dim=1)


class FreeSpace(NamedTuple):
    """The free directions, which a weight change may use. They are orthogonal to the preserved directions.

    Only one basis is stored: the basis of the preserved directions or of the free directions, whichever is smaller.

    Attributes:
        basis: [d, n], orthonormal.
        preserved: True if ``basis`` spans the preserved directions, False if it spans the free directions.
        rank: number of preserved directions.
    """

    basis: Tensor
    preserved: bool
    rank: int


def free_space(directions: Tensor, dtype: torch.dtype = torch.float32) -> FreeSpace:
    """Prepare the projection that removes the given directions from a change.

    Args:
        directions: [d, r], orthonormal in fp64.
        dtype: dtype of the returned basis.

    Returns:
        The space in which the given directions are preserved. Its basis has at most d * d / 2 values.
    """
    size, rank = directions.shape
    if 2 * rank <= size:
        return FreeSpace(directions.to(dtype).contiguous(), True, rank)
    complement = torch.linalg.qr(directions, mode="complete")[0][:, rank:]
    return FreeSpace(complement.to(dtype).contiguous(), False, rank)


def project_free(delta: Tensor, space: FreeSpace) -> Tensor:
    """Remove the preserved directions from each row of a change.

    For a change D, the result is ``D - (D U) Uᵀ``. The columns of U are the preserved directions. If ``space`` contains
    the free directions N instead, the same result is computed as ``(D N) Nᵀ``.

    Args:
        delta: [m, d], the change, in the dtype of the basis. The last dimension must belong to the layer's inputs. For
            a ``Conv1D``, pass the transposed change.
        space: from :func:`free_space`.

    Returns:
        [m, d]. ``result @ U`` is zero up to rounding, about 1e-7 of ``delta`` in fp32.
    """
    with full_precision(delta.device.type):
        within = (delta @ space.basis) @ space.basis.T
        return delta - within if space.preserved else within


@lru_cache(maxsize=8)
def _random_vectors(size: int) -> Tensor:
    """Return random vectors, [size, _SKETCH]. Every call returns the same vectors."""
    return torch.randn(size, _SKETCH, generator=torch.Generator().manual_seed(0))


def project_gradient_free(gradient: Tensor, space: FreeSpace) -> Tensor:
    """Compute the same as :func:`project_free` up to rounding, but faster if the gradient has a low rank.

    The gradient of a linear layer is a sum of outer products, one per token. If a batch has few tokens, its gradient
    therefore has a low rank. A random sketch ("Finding structure with randomness", arXiv 0909.4061) factors such a
    gradient into a product Q B, and only B is projected. If the rank is not low, the whole gradient is projected.

    Args:
        gradient: [m, d], in the dtype of the basis.
        space: from :func:`free_space`.

    Returns:
        [m, d].
    """
    if min(gradient.shape) < 4 * _SKETCH:
        return project_free(gradient, space)
    with full_precision(gradient.device.type):
        span, triangle = torch.linalg.qr(gradient @ _random_vectors(gradient.shape[1]).to(gradient))
        sizes = triangle.diagonal().abs()
        # If the last vectors of the sketch are linear combinations of the first ones, the sketch spans the gradient.
        if not bool(sizes[-_SPARE:].max() <= _ROUNDING * sizes.max()):
            return project_free(gradient, space)
        return span @ project_free(span.T @ gradient, space)
