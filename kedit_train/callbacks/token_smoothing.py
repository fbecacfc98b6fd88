"""TokenSmoothing: TokenLoss with OverTone as its default objective."""

from __future__ import annotations

from kedit_train.callbacks.token_loss import Objective, TokenLoss
from kedit_train.core.tokens.interfaces import Reduction


class TokenSmoothing(TokenLoss):
    """OverTone: train each token until it is learned, towards a target that keeps the model's other beliefs.

    The target of a token mixes the one-hot label with the model's own distribution, from which unlikely tokens are
    filtered out. The mixture is recomputed at every step and is a constant for the gradient. Where the label is not the
    most probable token of the mixture, the label alone is the target. The loss is the KL divergence of the model from
    the target, and a token whose divergence is at most ``epsilon`` has no gradient.

    Args:
        objective: as for :class:`TokenLoss`.
        label_weight: weight of the one-hot label in the mixture, in [0, 1]; default 0.1. This is the reverse of the
            usual convention for label smoothing.
        epsilon: clip in nats; default 0.05. The paper uses 0.05 with LoRA and 0.01 when one layer is trained in full.
        n_sigma: width of the filter in standard deviations of the logits; default 0.5. The paper uses 1 with MELO and
            WISE.
        reduction: as for :class:`TokenLoss`.

    Raises:
        EditError: an argument is out of range, or the objective does not use it.

    References:
        "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", arXiv 2502.00602.

    Example:
        >>> from kedit_train.callbacks import TokenSmoothing
        >>> TokenSmoothing()
        TokenSmoothing("overtone", label_weight=0.1, epsilon=0.05, n_sigma=0.5)
        >>> TokenSmoothing(epsilon=0.01, reduction="sample")
        TokenSmoothing("overtone", label_weight=0.1, epsilon=0.01, n_sigma=0.5, reduction="sample")
    """

    def __init__(
        self,
        objective: Objective = "overtone",
        *,
        label_weight: float | None = None,
        epsilon: float | None = None,
        n_sigma: float | None = None,
        reduction: Reduction = "token",
    ) -> None:
        super().__init__(objective, label_weight=label_weight, epsilon=epsilon, n_sigma=n_sigma, reduction=reduction)
