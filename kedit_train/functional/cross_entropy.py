"""Cross-entropy with a clip."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional.clipping import clipped
from kedit_train.functional.precision import wide


def cross_entropy(logits: Tensor, labels: Tensor, *, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Score tokens by cross-entropy.

    The values are those of ``torch.nn.functional.cross_entropy`` bit for bit, so that a run logs what its host would.

    Args:
        logits: [N, V] at the positions that predict ``labels``; any float dtype, computed in fp32 (fp64 stays fp64).
        labels: [N] token ids.
        epsilon: clip in nats. A token whose cross-entropy is at most this has no gradient.

    Returns:
        The loss [N] in nats, and whether it is above ``epsilon`` [N] bool.
    """
    return clipped(F.cross_entropy(wide(logits), labels, reduction="none"), epsilon)
