"""Assign supervised tokens to the sequences of a batch, and compute the weight of each token in a mean."""

from __future__ import annotations

import torch
from torch import Tensor


def text_positions(position_ids: Tensor | None) -> Tensor | None:
    """Return the position of each token in its sequence, or None if the positions are not known.

    Args:
        position_ids: the argument of the model's forward call, [batch, length] or [1, length]. Vision-language models
            also accept [3, batch, length] (the positions in time, height and width) and [4, batch, length] (the
            position in the sequence, then these three). With [3, batch, length], the result is None.
    """
    if position_ids is None or position_ids.ndim < 3:
        return position_ids
    return position_ids[0] if len(position_ids) == 4 else None


def sequence_numbers(where: Tensor, positions: Tensor | None) -> Tensor:
    """Number the sequences of a batch, and return for each supervised token the number of its sequence.

    Args:
        where: [batch, length - 1] bool, the positions that predict a supervised token.
        positions: position ids, [batch, length] or [1, length]. A new sequence starts at every position id 0, so a
            packed row may contain several sequences. With None, every row is one sequence.

    Returns:
        [N] int64, one number for each of the N supervised tokens in order. The numbers begin at 0 and have no gaps.
    """
    sequence = torch.arange(len(where), device=where.device).unsqueeze(1).expand_as(where)
    if positions is not None:
        starts = (positions.to(where.device) == 0).expand(len(where), where.shape[1] + 1)
        # The numbers are shifted by one, because a position predicts the token after it.
        sequence = starts.reshape(-1).cumsum(0).reshape(starts.shape)[:, 1:]
    return sequence[where].unique(return_inverse=True)[1]


def first_of_sequence(numbers: Tensor) -> Tensor:
    """Return, for each supervised token, the index of the first supervised token in its sequence.

    Args:
        numbers: [N], from :func:`sequence_numbers`.

    Returns:
        [N] int64, indices into the N supervised tokens.
    """
    indices = torch.arange(len(numbers), device=numbers.device)
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[1:] = numbers[1:] != numbers[:-1]
    return indices[begins][numbers]


def sequence_weights(where: Tensor, positions: Tensor | None, *, left_out: int = 0, shares: int = 1) -> Tensor:
    """Return token weights that make every sequence count equally.

    With these weights, the weighted sum of the token losses is a mean over sequences. The loss of a sequence is the
    mean over its tokens.

    Args:
        where: [batch, length - 1] bool, the positions that predict a supervised token.
        positions: as for :func:`sequence_numbers`.
        left_out: number of sequences that were removed from the batch. The mean divides by the number of all sequences,
            including the removed ones.
        shares: number of micro-batch losses that the host adds up in one optimizer step, or 1 if the host averages
            these losses. The weights are divided by this number.

    Returns:
        [batch, length - 1] fp32, zero at unsupervised positions.
    """
    numbers = sequence_numbers(where, positions)
    lengths = torch.bincount(numbers)
    # The dtype is explicit, because Lightning makes bf16 the default dtype with precision="bf16-true".
    weights = torch.zeros(where.shape, dtype=torch.float32, device=where.device)
    weights[where] = 1.0 / (lengths[numbers].float() * max(1, len(lengths) + left_out) * shares)
    return weights
