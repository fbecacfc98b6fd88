"""Cross-entropy that is clipped from below."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional.clipping import clipped
from kedit_train.functional.precision import wide


def cross_entropy(logits: Tensor, labels: Tensor, *, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each token, clipped from below.

    Values above the clip equal those of ``torch.nn.functional.cross_entropy`` bit for bit.

    Args:
        logits: [N, V] at the positions that predict ``labels``, any float dtype. The loss is computed in fp32 (in fp64
            for fp64 logits).
        labels: [N] token ids.
        epsilon: threshold in nats. A token whose cross-entropy is at most ``epsilon`` has no gradient.

    Returns:
        The loss [N] in nats, and a bool tensor [N] that is True where the cross-entropy is above ``epsilon``.
    """
    return clipped(F.cross_entropy(wide(logits), labels, reduction="none"), epsilon)
