"""TokenSmoothing: TokenLoss with OverTone as its default objective."""

from __future__ import annotations

from kedit_train.callbacks.token_loss import Objective, TokenLoss
from kedit_train.core.tokens.interfaces import Reduction


class TokenSmoothing(TokenLoss):
    """Train each token towards a smoothed target until the token is learned (OverTone).

    The target of a token is a mixture of the one-hot label and the model's own distribution without unlikely tokens.
    The mixture is recomputed at every step, and no gradient flows through it. If the label is not the most probable
    token of the mixture, the target is the label alone. The loss is the KL divergence of the model from the target. A
    token with a divergence of at most ``epsilon`` has no gradient.

    Args:
        objective: see :class:`TokenLoss`.
        label_weight: weight of the one-hot label in the mixture, in [0, 1]; default 0.1. It corresponds to a label
            smoothing factor of 1 - ``label_weight``.
        epsilon: threshold (clip) in nats; default 0.05. The OverTone paper uses 0.05 with LoRA and 0.01 when one layer
            is trained in full.
        n_sigma: width of the filter that removes unlikely tokens, in standard deviations of the logits; default 0.5.
            The OverTone paper uses 1 with MELO and WISE.
        reduction: see :class:`TokenLoss`.

    Raises:
        EditError: an argument is out of range, or an argument is given that the objective does not use.

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
