"""Compute dual keys: vectors that answer to one key each, and hardly to the inputs of other texts.

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


def dual_keys(keys: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Return the dual key of every key.

    Among all vectors a with the same products ``aᵀ k`` for the given keys, a dual key has the smallest
    ``aᵀ (A / t + damping I) a``. A is the second moment of the inputs on other texts. t is the median of its
    diagonal, because the mean depends mostly on a few large inputs at the first token (an attention sink).

    Args:
        keys: n keys, [n, d].
        moment: A, [d, d], symmetric and positive semi-definite.
        damping: above 0.

    Returns:
        [n, d], in the dtype of the keys. It is computed in fp64.

    Raises:
        ValueError: half of the moment's diagonal is zero, a value is not finite, or every key is zero.

    Example:
        >>> keys = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> (dual_keys(keys, torch.eye(2), 0.01) @ keys.T).round(decimals=2)
        tensor([[1., 0.],
                [0., 1.]])
    """
    rows = widest(keys)
    solved = _solve(rows, widest(moment), damping)
    products = solved @ rows.T
    size = float(products.diagonal().mean())
    if not 0.0 < size < float("inf"):
        raise ValueError("all keys are zero or not finite")
    ridge = _RIDGE * size * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return torch.linalg.solve(products + ridge, solved).to(keys)


def distinctness(keys: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Return how much each key differs from the inputs on other texts.

    The result is ``kᵀ (A + damping t I)⁻¹ k / d``. Its mean over the inputs on the texts is at most 1. If the result is
    large, a weight change along the dual key of k hardly changes the outputs on the texts. If it is far below 1, as at
    an attention sink, many tokens of the texts have nearly the same input.

    Args:
        keys: n keys, [n, d].
        moment: A, [d, d], as in :func:`dual_keys`. t is the median of its diagonal.
        damping: above 0.

    Returns:
        [n], above 0 for keys that are not zero, in fp64.
    """
    rows = widest(keys)
    exact = widest(moment)
    return (_solve(rows, exact, damping) * rows).sum(dim=1) / (float(exact.diagonal().median()) * len(exact))


def _solve(rows: Tensor, moment: Tensor, damping: float) -> Tensor:
    scale = float(moment.diagonal().median())
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"the median of the diagonal of the second moment is {scale:g}")
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve(moment / scale + damping * identity, rows.T).T
