"""What each target token is pulled towards: OverTone, and uniform smoothing as its plain case.

Source: "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing" (OverTone, Liu et al., ICML 2025,
arXiv 2502.00602), equations 2 and 3 and algorithm 1; its filter is top-n-sigma (Tang et al., arXiv 2411.07641).
No official code exists; where the paper is silent the choice and its reason stand beside the line.
"""

from __future__ import annotations

import torch
from torch import Tensor


def overtone_target(
    logits: Tensor, labels: Tensor, *, lam: float = 0.1, n_sigma: float = 0.5, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Build OverTone's target distribution, a constant with respect to the model.

    The model's own distribution, cut to the tokens whose logit is above ``max - n_sigma * std``, is mixed with the
    one-hot label; the mixture is used where the label is its strict maximum, the one-hot label elsewhere.

    Args:
        logits: [N, V] at the positions that predict ``labels``; any float dtype, computed in fp32 (fp64 stays fp64).
        labels: [N] token ids.
        lam: mass of the one-hot label in the mixture, in [0, 1]; 1 is cross-entropy. The reverse of the usual
            label-smoothing convention, as in the paper.
        n_sigma: width of the filter in standard deviations of the logits; ``inf`` keeps every token.
        vocab_size: the true vocabulary where the head has padded rows beyond it: those take no part in the standard
            deviation and never survive the filter.

    Returns:
        target [N, V] in fp32, accepted [N] bool (the mixture was used), survivors [N] (tokens that the filter left).
    """
    with torch.no_grad():
        logits = _upcast(logits)
        true = logits if vocab_size is None else logits[:, :vocab_size]
        # The standard deviation of no rows at all is a warning.
        spread = true.std(-1, keepdim=True) if len(true) else true.new_zeros(0, 1)
        bound = true.amax(-1, keepdim=True) - n_sigma * spread
        # Strictly above the bound survives, as in the paper; -inf (n_sigma = inf) keeps everything.
        keep = logits > bound
        if vocab_size is not None:
            keep[:, vocab_size:] = False
        # A flat row has no spread, so nothing is strictly above its maximum: there the filter keeps the maxima.
        keep |= (logits == true.amax(-1, keepdim=True)) & ~keep.any(-1, keepdim=True)
        mixture = logits.masked_fill(~keep, float("-inf")).softmax(-1).mul_(1.0 - lam)
        place = labels.unsqueeze(-1)
        mixture.scatter_add_(-1, place, torch.full_like(place, 1, dtype=mixture.dtype).mul_(lam))
        mass = mixture.gather(-1, place)
        rival = mixture.scatter(-1, place, -1.0).amax(-1, keepdim=True)
        accepted = mass > rival
        one_hot = torch.zeros_like(mixture).scatter_(-1, place, 1.0)
        return torch.where(accepted, mixture, one_hot), accepted.squeeze(-1), keep.sum(-1)


def uniform_target(logits: Tensor, labels: Tensor, *, lam: float = 0.9, vocab_size: int | None = None) -> Tensor:
    """Mix the one-hot label (mass ``lam``) with the uniform distribution over the true vocabulary; target [N, V]."""
    with torch.no_grad():
        size = vocab_size or logits.shape[-1]
        target = torch.zeros_like(_upcast(logits))
        target[:, :size] = (1.0 - lam) / size
        place = labels.unsqueeze(-1)
        return target.scatter_add_(-1, place, torch.full_like(place, 1, dtype=target.dtype).mul_(lam))


def smoothed_loss(logits: Tensor, target: Tensor, *, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Clipped forward divergence ``max(KL(target || model), epsilon)`` for each token, in nats.

    Args:
        logits: [N, V], differentiated. target: [N, V], a constant.
        epsilon: a token whose divergence is not above it has no gradient: a token-level early stop.

    Returns:
        loss [N], active [N] bool (divergence above ``epsilon``).
    """
    log_probs = _upcast(logits).log_softmax(-1)
    negative_entropy = torch.special.xlogy(target, target).sum(-1)
    # A logit of minus infinity (a padded row of the head) times no mass is nothing, not NaN.
    cross_entropy = -(target * log_probs.masked_fill(target == 0, 0.0)).sum(-1)
    divergence = negative_entropy + cross_entropy
    # Written so that NaN counts as active: a model that diverged has not learned its tokens.
    active = ~(divergence <= epsilon)
    # Not clamp(min=): its gradient at equality is one, and a clipped token must have none.
    return torch.where(active, divergence, torch.full_like(divergence, epsilon)), active.detach()


def overtone(
    logits: Tensor,
    labels: Tensor,
    *,
    lam: float = 0.1,
    epsilon: float = 0.05,
    n_sigma: float = 0.5,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score tokens by OverTone; ``lam=1, epsilon=0`` is cross-entropy (proposition 3.1 of the paper).

    Defaults are the paper's for LoRA (appendix B.1); for FT-M it used ``epsilon=0.01``.

    Returns:
        loss [N] in nats, active [N] bool.
    """
    target, _, _ = overtone_target(logits, labels, lam=lam, n_sigma=n_sigma, vocab_size=vocab_size)
    return smoothed_loss(logits, target, epsilon=epsilon)


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
