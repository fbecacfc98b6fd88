"""Compare hidden states with stored keys. A state matches a key if their distance is at most the radius of the key.

References:
    "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", arXiv 2211.11031.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_distances(states: Tensor, keys: Tensor) -> Tensor:
    """Return the Euclidean distance between every state and every key.

    The distances are computed from the differences of the entries. The usual formula with a matrix product is not used,
    because its rounding errors can be larger than small distances.

    Args:
        states: [positions, hidden], any floating dtype.
        keys: [keys, hidden], fp32.

    Returns:
        [positions, keys], fp32.

    Example:
        >>> key_distances(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        tensor([[5.]])
    """
    return torch.cdist(states.float(), keys, compute_mode="donot_use_mm_for_euclid_dist")


def matches(states: Tensor, keys: Tensor, radii: Tensor) -> Tensor:
    """Return, for each state, whether it matches at least one key.

    A state matches a key if their distance is at most the radius of the key. A key with a radius of 0 matches no state,
    not even a state that equals the key.

    Args:
        states: [positions, hidden], any floating dtype.
        keys: [keys, hidden], fp32.
        radii: [keys], fp32.

    Returns:
        [positions], bool.

    Example:
        >>> keys, radii = torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([1.0, 2.0])
        >>> matches(torch.tensor([[0.0, 1.0], [0.0, 2.0], [7.0, 0.0]]), keys, radii)
        tensor([ True, False,  True])
    """
    return ((key_distances(states, keys) <= radii) & (radii > 0)).any(dim=-1)


def opened_from(near: Tensor, before: Tensor) -> Tensor:
    """Return at which positions the gate of each row is open. A gate opens at the first match and stays open.

    Args:
        near: [rows, positions], bool, True where a position matches a key.
        before: [rows], bool, True if the gate of the row was already open before the first position.

    Returns:
        [rows, positions], bool.

    Example:
        >>> near = torch.tensor([[False, True, False], [False, False, False]])
        >>> opened_from(near, torch.tensor([False, False]))
        tensor([[False,  True,  True],
                [False, False, False]])
    """
    return (near.cumsum(dim=1) > 0) | before[:, None]
