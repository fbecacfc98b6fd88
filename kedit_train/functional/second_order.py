"""Estimate the KL divergence that a weight change causes.

For a linear layer ``y = W k`` and a weight change D, K-FAC estimates the divergence on given texts as
``KL = 1/2 tr(S D A Dᵀ)`` per token. A = E[k kᵀ] is the second moment of the inputs, [in, in]. S = E[g gᵀ] is the second
moment of the gradients g at the outputs, [out, out]. The labels for these gradients are sampled from the model.

References:
    "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv 1503.05671.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.precision import full_precision, widest


def second_order_divergence(change: Tensor, output_moment: Tensor | None, input_moment: Tensor) -> Tensor:
    """Return the estimated KL divergence per token, ``1/2 tr(S D A Dᵀ)``, in nats.

    Args:
        change: D, [out, in].
        output_moment: S, [out, out], symmetric. None stands for the identity matrix. The result is then half of the
            mean squared change of the layer's output.
        input_moment: A, [in, in], symmetric.

    Returns:
        A scalar. It can be differentiated once with respect to ``change``. The gradient is ``S D A``.

    Example:
        >>> second_order_divergence(torch.ones(2, 3), torch.eye(2), torch.eye(3))
        tensor(3.)
    """
    gradient = change.detach() @ input_moment
    if output_moment is not None:
        gradient = output_moment @ gradient
    return divergence_of_gradient(change, gradient)


def divergence_of_gradient(change: Tensor, gradient: Tensor) -> Tensor:
    """Return the estimated divergence of a change. The caller passes the gradient of this divergence.

    The result equals the result of :func:`second_order_divergence`. But the backward pass uses the given gradient,
    where autograd would compute the products with S and A a second time.

    Args:
        change: D, [out, in].
        gradient: ``S D A``, [out, in], without a graph.

    Returns:
        A scalar, ``1/2 tr(S D A Dᵀ)``. It can be differentiated once with respect to ``change``.
    """
    return (change * gradient).sum() - 0.5 * (change.detach() * gradient).sum()


def inverse_root(moment: Tensor, damping: float) -> Tensor:
    """Return the symmetric inverse square root of ``moment / t + damping * I``.

    The number t is the mean of the diagonal of ``moment``. The division by t makes ``damping`` independent of the scale
    of the model's activations and gradients. A large damping makes the result similar to a multiple of the identity
    matrix.

    Args:
        moment: [d, d], symmetric and positive semi-definite.
        damping: above 0.

    Returns:
        [d, d], in the dtype of the moment. The root is computed in fp64.

    Raises:
        ValueError: the moment is zero or not finite.
    """
    exact = widest(moment)
    scale = float(exact.diagonal().mean())
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"the mean of the diagonal of the second moment must be > 0 and finite, got {scale:g}")
    values, vectors = torch.linalg.eigh(exact / scale)
    # Rounding can make the smallest eigenvalues slightly negative.
    roots = (values.clamp_min(0.0) + damping).rsqrt()
    return ((vectors * roots) @ vectors.T).to(moment)


def transform(matrix: Tensor, output_root: Tensor | None, input_root: Tensor) -> Tensor:
    """Return the product ``P M Q``, which transforms a gradient or a weight change.

    P is the inverse root of S, the second moment of the gradients at the layer's outputs. Q is the inverse root of A,
    the second moment of the layer's inputs. P and Q define new coordinates for the weight. In these coordinates, the
    estimated divergence of a change is proportional to the squared norm of the change, if the damping is small.

    - If M is the gradient of the weight, the result is the gradient in the new coordinates.
    - If M is a change in the new coordinates, the result is the change of the weight.

    Args:
        matrix: M, [out, in].
        output_root: P, [out, out], from :func:`inverse_root` of S. None stands for the identity matrix.
        input_root: Q, [in, in], from :func:`inverse_root` of A.

    Returns:
        [out, in], in the dtype of the roots.
    """
    with full_precision(matrix.device.type):
        product = matrix.to(input_root.dtype) @ input_root
        return product if output_root is None else output_root @ product
