"""Compute dual keys: each has the inner product 1 with its own key, 0 with other keys, and hardly any with texts.

A linear layer computes ``y = W k``. Its input k is also called a key. A weight change ``v aᵀ`` adds ``v (aᵀ k)`` to the
output. If a is the dual key of a key k, then ``aᵀ k`` is 1, so the change adds v to the output for this key. For the
other given keys, ``aᵀ k`` is 0, and for the inputs on other texts, it is small.

References:
    "Locating and Editing Factual Associations in GPT", arXiv 2202.05262 (keys and values of a linear layer).
    "Mass-Editing Memory in a Transformer", arXiv 2210.07229 (many keys at once, second moments of other inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.precision import widest

# Added to the diagonal of the matrix of products between keys, as a fraction of the mean of its diagonal. Equal keys,
# such as those of two edits with the same subject, then share one dual key, and no matrix is singular.
_RIDGE = 1e-3


class DampedMoment:
    """The matrix ``A + damping t I``, factorized once. t is the median of the diagonal of A.

    The median is used because the mean depends mostly on a few large inputs at the first token (an attention sink).

    Args:
        moment: A, the second moment of the inputs on other texts, [d, d], symmetric and positive semi-definite.
        damping: above 0.

    Raises:
        ValueError: at least half of the diagonal of the moment is zero, or a value is not finite.
    """

    def __init__(self, moment: Tensor, damping: float) -> None:
        exact = widest(moment)
        scale = float(exact.diagonal().median())
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"the median of the diagonal of the second moment is {scale:g}")
        identity = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
        self._factors = torch.linalg.lu_factor(exact + damping * scale * identity)

    def solve(self, rows: Tensor) -> Tensor:
        """Return the rows, [n, d] in fp64, multiplied by the inverse of the matrix."""
        return torch.linalg.lu_solve(*self._factors, rows.T).T


def dual_keys(keys: Tensor, moment: DampedMoment) -> tuple[Tensor, Tensor]:
    """Return the dual key of every key, and how much it changes the outputs on other texts.

    The inner product of a dual key with its own key is 1, and with the other given keys 0. Among all such vectors a, it
    has the smallest ``aᵀ M a``. M is the damped moment. n equal keys share one dual key, whose product with them is
    1 / n.

    Args:
        keys: n keys, [n, d].
        moment: the damped second moment of the inputs on other texts.

    Returns:
        Two tensors in the dtype of the keys, which are computed in fp64. The dual keys, [n, d], and the root of
        ``aᵀ M a`` for each of them, [n]. If v has the norm 1, a weight change ``v aᵀ`` changes the outputs on the texts
        by this root mean square (with the damping). For a key that is zero, it is a tiny number.

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

    The result is ``kᵀ M⁻¹ k / d``, where M is the damped moment. Its mean over the inputs on the texts is at most 1. If
    the result is large, a weight change along the dual key of k hardly changes the outputs on the texts. If it is far
    below 1, as at an attention sink, many tokens of the texts have nearly the same input.

    Args:
        keys: n keys, [n, d].
        moment: the damped second moment of the inputs on other texts.

    Returns:
        [n], above 0 for keys that are not zero, in fp64.
    """
    rows = widest(keys)
    return (moment.solve(rows) * rows).mean(dim=1)
