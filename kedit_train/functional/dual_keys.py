"""Compute dual keys: vectors whose inner product is 1 with one input of a layer, and 0 or small with other inputs.

A linear layer computes ``y = W k``. Its input k is also called a key. A weight change ``v aᵀ`` adds ``v (aᵀ k)`` to the
output. If a is the dual key of k, then ``aᵀ k`` is 1, so the change adds v to the output for this key. The inner
product of a with every other given key is 0, so the outputs for these keys do not change. The inner products of a with
the layer's inputs on other texts are small.

References:
    "Locating and Editing Factual Associations in GPT", arXiv 2202.05262 (keys and values of a linear layer).
    "Mass-Editing Memory in a Transformer", arXiv 2210.07229 (many keys at once, second moments of other inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.precision import widest

# This fraction of the mean of the diagonal is added to the diagonal of the matrix of products between keys. Otherwise,
# the matrix would be singular if two keys are equal, for example the keys of two edits with the same subject.
_RIDGE = 1e-3


class DampedMoment:
    """The damped second moment ``A + damping t I`` of a layer's inputs, factorized once.

    A is the second moment, and t is the median of the diagonal of A. The median is used because the mean depends mostly
    on a few large inputs at the first token (an attention sink).

    Args:
        moment: A, the second moment of the inputs on other texts, [d, d], symmetric and positive semi-definite.
        damping: the factor of ``t I``, above 0.

    Raises:
        ValueError: at least half of the diagonal of the moment is zero, or a value is not finite.
    """

    def __init__(self, moment: Tensor, damping: float) -> None:
        exact = widest(moment)
        scale = float(exact.diagonal().median())
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"the median of the diagonal of the second moment must be > 0 and finite, got {scale:g}")
        identity = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
        self._factors = torch.linalg.lu_factor(exact + damping * scale * identity)

    def solve(self, rows: Tensor) -> Tensor:
        """Return the rows, [n, d] in fp64, multiplied by the inverse of the matrix."""
        return torch.linalg.lu_solve(*self._factors, rows.T).T


def dual_keys(keys: Tensor, moment: DampedMoment) -> tuple[Tensor, Tensor]:
    """Return the dual key of every key, and how much a change along each dual key changes the outputs on other texts.

    The inner product of a dual key with its own key is 1, and with every other given key 0. Among all vectors a with
    these inner products, the dual key has the smallest ``aᵀ M a``, where M is the damped moment. If m keys are equal,
    they have the same dual key, and its inner product with each of them is 1 / m.

    Args:
        keys: n keys, [n, d].
        moment: the damped second moment of the inputs on other texts.

    Returns:
        Two tensors, computed in fp64 and returned in the dtype of the keys: the dual keys, [n, d], and the root of
        ``aᵀ M a`` for each dual key a, [n]. If v has the norm 1, this root is the root mean square by which a weight
        change ``v aᵀ`` changes the outputs on the texts, including the damping. For a key that is zero, the root is a
        tiny number above 0.

    Raises:
        ValueError: all keys are zero, or a key is not finite.

    Example:
        >>> keys = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> duals, changes = dual_keys(keys, DampedMoment(torch.eye(2), 0.01))
        >>> (duals @ keys.T).round(decimals=2)
        tensor([[1., 0.],
                [0., 1.]])
        >>> changes.round(decimals=1)
        tensor([1.4000, 1.0000])
    """
    rows = widest(keys)
    solved = moment.solve(rows)
    products = solved @ rows.T
    size = float(products.diagonal().mean())
    if not 0.0 < size < float("inf"):
        raise ValueError("all keys are zero, or a key is not finite")
    damped = products + _RIDGE * size * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    duals = torch.linalg.solve(damped, solved)
    # aᵀ M a, where the rows a are the inverse of the damped products times the solved keys.
    squares = torch.linalg.solve(damped, torch.linalg.solve(damped, products).T).diagonal()
    return duals.to(keys), squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt().to(keys)


def distinctness(keys: Tensor, moment: DampedMoment) -> Tensor:
    """Return how much each key differs from the inputs on other texts.

    The result for a key k is ``kᵀ M⁻¹ k / d``, where M is the damped moment. For the inputs on the texts themselves,
    the mean of this value is at most 1. If the value of a key is large, a weight change along its dual key hardly
    changes the outputs on the texts. If the value is far below 1, many tokens of the texts have nearly the same input
    as this key, for example at an attention sink.

    Args:
        keys: n keys, [n, d].
        moment: the damped second moment of the inputs on other texts.

    Returns:
        [n], above 0 for keys that are not zero, in fp64.
    """
    rows = widest(keys)
    return (moment.solve(rows) * rows).mean(dim=1)
