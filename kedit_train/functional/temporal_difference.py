"""The targets and the loss that train a value function by temporal differences.

References:
    "Aligning Large Language Models with Representation Editing: A Control Perspective" (RE-Control), arXiv 2406.05954.
    Sutton and Barto, "Reinforcement Learning: An Introduction", second edition, chapter 12, for the lambda-return.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_train.errors import EditError


def last_valid(mask: Tensor) -> Tensor:
    """Return the index of the last valid position of each sequence.

    Args:
        mask: [batch, length], bool. True marks the positions of the sequence. Padding may be on both sides.

    Returns:
        [batch], int64.

    Raises:
        EditError: a sequence has no valid position.

    Example:
        >>> last_valid(torch.tensor([[True, True, False], [False, True, True]]))
        tensor([1, 2])
    """
    if not bool(mask.any(-1).all()):
        raise EditError("every row of mask must have at least one valid position (True); remove empty sequences.")
    # argmax returns the first maximum, so argmax of the mask itself would be the first valid position.
    return mask.long().cumsum(-1).argmax(-1)


def td_targets(values: Tensor, rewards: Tensor, mask: Tensor, *, trace: float = 0.0, discount: float = 1.0) -> Tensor:
    """Return the training targets of a value function: the lambda-return at each position.

    A sequence has one reward, at its last valid position. The target of this position is the reward. The target of an
    earlier position t is ``discount * ((1 - trace) * values[t + 1] + trace * target[t + 1])``. With ``trace=0``, the
    targets are those of TD(0), which RE-Control uses. With ``trace=1``, the targets are the discounted reward.

    The targets have no gradient. So the loss at position t trains ``values[t]``, but not ``values[t + 1]``.

    Args:
        values: [batch, length], the values of a target network or of the trained network.
        rewards: [batch], the reward of each sequence.
        mask: [batch, length], bool. The valid positions of a sequence must be consecutive.
        trace: lambda, in [0, 1].
        discount: gamma, in [0, 1].

    Returns:
        [batch, length] in the dtype of ``values``; 0 at positions that are not valid.

    Raises:
        EditError: the shapes do not fit each other, or a sequence has no valid position.

    Example:
        >>> values, mask = torch.tensor([[0.1, 0.2, 0.3, 9.0]]), torch.tensor([[True, True, True, False]])
        >>> td_targets(values, torch.tensor([1.0]), mask)
        tensor([[0.2000, 0.3000, 1.0000, 0.0000]])
    """
    if values.ndim != 2 or values.shape != mask.shape or rewards.shape != values.shape[:1]:
        raise EditError(
            "values and mask must have the shape [batch, length], and rewards the shape [batch], got "
            f"{list(values.shape)}, {list(mask.shape)} and {list(rewards.shape)}."
        )
    values, rewards = values.detach(), rewards.detach().to(values)
    ends = last_valid(mask)
    targets = torch.zeros_like(values)
    following = torch.zeros_like(rewards)
    for t in reversed(range(values.shape[1])):
        if t + 1 < values.shape[1]:
            following = discount * ((1 - trace) * values[:, t + 1] + trace * targets[:, t + 1])
        targets[:, t] = torch.where(ends == t, rewards, following)
    return torch.where(mask, targets, torch.zeros_like(targets))


def value_loss(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error over the valid positions.

    Args:
        values: [batch, length], with a gradient.
        targets: [batch, length], as :func:`td_targets` returns them.
        mask: [batch, length], bool.

    Returns:
        A scalar.

    Raises:
        EditError: the shapes differ. (Broadcasting would compare every value with every target.)

    Example:
        >>> value_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[True, False]]))
        tensor(1.)
    """
    if not values.shape == targets.shape == mask.shape:
        raise EditError(
            "values, targets and mask must have the same shape, got "
            f"{list(values.shape)}, {list(targets.shape)} and {list(mask.shape)}."
        )
    return (values - targets.detach()).square()[mask].mean()
