"""Distances between the outputs of a model before and after an edit, and the error of a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kedit_train.functional.divergence import token_divergence
from kedit_train.functional.precision import wide

Distance = Literal["mse", "quantile", "kl"]


def output_distance(before: Tensor, now: Tensor, *, distance: Distance) -> Tensor:
    """Return the distance between the outputs before the edit and the outputs now, without averaging.

    - "mse": the squared difference of each value.
    - "quantile": the absolute difference of each value, for models that output quantiles. The mean over evenly spaced
      quantile levels approximates the 1-Wasserstein distance of the two forecasts. This distance is the integral of
      the absolute difference over all quantile levels.
    - "kl": KL(before || now) of each distribution, in nats. The last dimension holds the logits of one distribution.

    Args:
        before: the outputs before the edit. They can have any shape and float dtype.
        now: the outputs now, in the same shape.
        distance: "mse", "quantile" or "kl".

    Returns:
        With "mse" and "quantile", one distance per value, in the shape of the outputs. With "kl", one distance per
        distribution, so the last dimension is missing. The distances are computed in fp32 (in fp64 for fp64 outputs).

    Raises:
        ValueError: the shapes differ, or the distance is unknown.

    References:
        - "mse": Dark Experience for General Continual Learning, arXiv 2004.07211.
        - "quantile": Distributional Reinforcement Learning with Quantile Regression, arXiv 1710.10044, for the
          Wasserstein distance as an integral over quantiles.
        - "kl": Fast Model Editing at Scale (MEND), arXiv 2110.11309.

    Example:
        >>> before, now = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 5.0])
        >>> output_distance(before, now, distance="mse").tolist()
        [0.0, 0.25, 4.0]
        >>> output_distance(before, now, distance="quantile").tolist()
        [0.0, 0.5, 2.0]
        >>> round(output_distance(before, now, distance="kl").item(), 4)
        0.2352
    """
    if before.shape != now.shape:
        raise ValueError(f"the outputs must have the same shape, got {tuple(before.shape)} and {tuple(now.shape)}")
    if distance == "mse":
        return (wide(now) - wide(before)).square()
    if distance == "quantile":
        return (wide(now) - wide(before)).abs()
    if distance == "kl":
        classes = before.shape[-1]
        return token_divergence(before.reshape(-1, classes), now.reshape(-1, classes)).view(before.shape[:-1])
    raise ValueError(f"distance must be 'mse', 'quantile' or 'kl', got {distance!r}")


def quantile_loss(forecast: Tensor, target: Tensor, levels: Sequence[float]) -> Tensor:
    """Return the quantile loss (pinball loss), averaged over all values and quantile levels.

    Let q be the quantile at level u, and y the target. The loss is ``u * (y - q)`` if y is above q, and
    ``(1 - u) * (q - y)`` otherwise.

    Args:
        forecast: [..., Q], the quantiles of each target value.
        target: [...].
        levels: the Q quantile levels, each in (0, 1).

    Returns:
        A scalar, in the unit of the target.

    Raises:
        ValueError: the shapes do not match.

    References:
        A Multi-Horizon Quantile Recurrent Forecaster, arXiv 1711.11053.

    Example:
        >>> forecast, target = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([3.0])
        >>> round(quantile_loss(forecast, target, [0.1, 0.5, 0.9]).item(), 4)
        0.2667
    """
    if forecast.shape != (*target.shape, len(levels)):
        raise ValueError(
            f"the forecast must have the shape {(*target.shape, len(levels))}, got {tuple(forecast.shape)}"
        )
    above = wide(target).unsqueeze(-1) - wide(forecast)
    level = torch.tensor(levels, dtype=above.dtype, device=above.device)
    return torch.maximum(level * above, (level - 1.0) * above).mean()


def relative_change(before: Sequence[Tensor], now: Sequence[Tensor]) -> float:
    """Return the norm of the change of all outputs, divided by the norm of the outputs before the edit.

    Args:
        before: outputs before the edit, one tensor per forward pass.
        now: outputs now, tensors of the same shapes.

    Returns:
        A number >= 0: 0.0 if nothing changed, and infinity if the outputs changed and were all 0 before.

    Example:
        >>> relative_change([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 5.0])])
        0.2
    """
    pairs = [(a.double(), b.to(a.device).double()) for a, b in zip(before, now, strict=True)]
    change = sum(float((b - a).square().sum()) for a, b in pairs) ** 0.5
    norm = sum(float(a.square().sum()) for a, _ in pairs) ** 0.5
    if change == 0.0:
        return 0.0
    return change / norm if norm > 0.0 else float("inf")
