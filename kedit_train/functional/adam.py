"""Running averages of the gradients, as in Adam, and of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The usual decay rates of Adam.
_BETA1, _BETA2 = 0.9, 0.999
# Adam divides by the root mean square of each gradient entry. This fraction of the mean of these divisors is added to
# each divisor. Otherwise, an entry whose gradient is only a rounding error would move by a full step.
_EPSILON = 1e-6


@dataclass
class AdamAverages:
    """Running averages of gradients, squared gradients and loss.

    Args:
        means: average gradient by name, without bias correction.
        squares: average squared gradient by name, without bias correction.
        loss: average loss, without bias correction.
        steps: number of updates.
        momentum: decay rate of the averages of gradients and loss. With 0, the averages are the gradients and the loss
            of the last step.
        by_column: if True, all entries in a column of a matrix share one average squared gradient. Within each column,
            a step then has the direction of the average gradient.
        floor: added to the divisor of each entry, as a fraction of the mean of the divisors. A higher floor moves
            entries with small gradients less.

    References:
        Adam: A Method for Stochastic Optimization, arXiv 1412.6980.

    Example:
        >>> loss, means, directions = AdamAverages().update({"weight": torch.tensor([3.0, -0.5])}, 2.0)
        >>> round(loss, 6), means["weight"], directions["weight"].round(decimals=3)
        (2.0, tensor([ 3.0000, -0.5000]), tensor([ 1., -1.]))
    """

    means: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    steps: int = 0
    momentum: float = _BETA1
    by_column: bool = False
    floor: float = _EPSILON

    def update(
        self, gradients: Mapping[str, Tensor], loss: float, mean: Callable[[Tensor], Tensor] = torch.mean
    ) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        """Update the running averages with the gradients and the loss of a step.

        Args:
            gradients: gradient by name.
            loss: the loss from which the gradients were computed.
            mean: function that returns the mean of all entries of a tensor. For sharded tensors, pass a function that
                takes the mean over all shards.

        Returns:
            Three values: the average loss, the average gradient by name, and the direction of Adam by name. All
            averages are corrected for bias. A direction is the average gradient divided by the root of the average
            squared gradient. To make a step, subtract a multiple of the directions from the weights.
        """
        self.steps += 1
        self.loss = self.momentum * self.loss + (1 - self.momentum) * loss
        first, second = 1 - self.momentum**self.steps, 1 - _BETA2**self.steps
        means, directions = {}, {}
        for name, gradient in gradients.items():
            if name not in self.means:
                self.means[name] = torch.zeros_like(gradient)
                self.squares[name] = torch.zeros_like(gradient[:1] if self.by_column else gradient)
            # The averages are new tensors, because a saved state of the run may contain the previous tensors.
            self.means[name] = torch.lerp(self.means[name], gradient, 1 - self.momentum)
            squares = gradient.square()
            squares = squares.mean(dim=0, keepdim=True) if self.by_column else squares
            self.squares[name] = torch.lerp(self.squares[name], squares, 1 - _BETA2)
            means[name], roots = self.means[name] / first, (self.squares[name] / second).sqrt()
            # The smallest positive number avoids 0 / 0.
            floor = self.floor * mean(roots) + torch.finfo(roots.dtype).tiny
            directions[name] = means[name] / (roots + floor)
        return self.loss / first, means, directions
