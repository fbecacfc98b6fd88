"""A second-order model of the KL divergence that a change of a linear weight causes, and steps that follow this model.

For a linear layer ``y = W k``, K-FAC approximates the divergence that a change D of the weight causes on given texts:
``KL = 1/2 tr(S D A Dᵀ)`` per token. A = E[k kᵀ] is the second moment of the inputs, [in, in]. S = E[g gᵀ] is the second
moment of the gradients g at the outputs, [out, out], with labels that are sampled from the model.

References:
    "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv 1503.05671.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.functional.precision import full_precision, widest


def second_order_divergence(change: Tensor, output_moment: Tensor, input_moment: Tensor) -> Tensor:
    """Return the estimated KL divergence per token, ``1/2 tr(S D A Dᵀ)``, in nats.

    Args:
        change: D, [out, in].
        output_moment: S, [out, out].
        input_moment: A, [in, in].

    Returns:
        A scalar, differentiable with respect to ``change``.

    Example:
        >>> second_order_divergence(torch.ones(2, 3), torch.eye(2), torch.eye(3))
        tensor(3.)
    """
    return 0.5 * ((output_moment @ change) * (change @ input_moment)).sum()


def damped_inverse(moment: Tensor, damping: float) -> Tensor:
    """Return the inverse of ``moment / t + damping * I``, where t is the mean of the diagonal of the moment.

    The division by t makes ``damping`` independent of the scale of the model's activations and gradients. A large
    damping makes the inverse similar to the identity matrix.

    Args:
        moment: [d, d], symmetric and positive semi-definite.
        damping: above 0.

    Returns:
        [d, d], in the dtype of the moment. The inverse is computed in fp64.

    Raises:
        ValueError: the moment is zero or not finite.
    """
    exact = widest(moment)
    scale = float(exact.diagonal().mean())
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"the mean of the diagonal must be > 0 and finite, got {scale:g}")
    identity = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(exact / scale + damping * identity)).to(moment)


def precondition(gradient: Tensor, output_inverse: Tensor | None, input_inverse: Tensor) -> Tensor:
    """Return ``S⁻¹ G A⁻¹``, the direction that changes the loss most for a given divergence on the texts.

    Args:
        gradient: G, [out, in].
        output_inverse: the inverse of S, [out, out]. None leaves out this factor.
        input_inverse: the inverse of A, [in, in].

    Returns:
        [out, in], in the dtype of the inverses.
    """
    with full_precision(gradient.device.type):
        direction = gradient.to(input_inverse.dtype) @ input_inverse
        return direction if output_inverse is None else output_inverse @ direction
