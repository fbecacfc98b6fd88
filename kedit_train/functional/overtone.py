"""What each target token is pulled towards: OverTone, and uniform smoothing as its plain case.

Source: "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing" (OverTone, Liu et al., ICML 2025,
arXiv 2502.00602), equations 2 and 3 and algorithm 1; its filter is top-n-sigma (Tang et al., arXiv 2411.07641).
No official code exists; where the paper is silent the choice and its reason stand beside the line.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional.closed_form_losses import rowwise
from kedit_train.functional.precision import wide


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
        logits = wide(logits)
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
        target = torch.zeros_like(wide(logits))
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
    log_probs = wide(logits).log_softmax(-1)
    negative_entropy = torch.special.xlogy(target, target).sum(-1)
    # A logit of minus infinity (a padded row of the head) times no mass is nothing, not NaN.
    cross_entropy = -(target * log_probs.masked_fill(target == 0, 0.0)).sum(-1)
    divergence = negative_entropy + cross_entropy
    return clipped(divergence, epsilon)


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

    The numbers of :func:`overtone_target` and :func:`smoothed_loss`, without a target: with the mixture t, its filtered
    distribution f over the survivors, and Z, Z_f the log of either's normaliser, all but the label's share of
    KL(t || p) is ``(1 - t_y) (log(1 - lam) + Z - Z_f)``, because the logits cancel. Defaults are the paper's for LoRA
    (appendix B.1); for FT-M it used ``epsilon=0.01``.

    Args:
        logits: [N, V] at the positions that predict ``labels``; any float dtype, computed in fp32 (fp64 stays fp64).
        labels: [N] token ids.
        lam, n_sigma, vocab_size: as for :func:`overtone_target`. epsilon: as for :func:`smoothed_loss`.

    Returns:
        loss [N] in nats, active [N] bool.
    """
    loss, active, *_ = overtone_statistics(
        logits, labels, lam=lam, epsilon=epsilon, n_sigma=n_sigma, vocab_size=vocab_size
    )
    return loss, active


def overtone_statistics(
    logits: Tensor, labels: Tensor, *, lam: float, epsilon: float, n_sigma: float, vocab_size: int | None = None
) -> tuple[Tensor, ...]:
    """Score tokens as :func:`overtone` does.

    Returns:
        loss [N], active [N] bool, accepted [N] bool, survivors [N], mass of the label in its target [N].
    """
    size = logits.shape[-1] if vocab_size is None else vocab_size

    def value(z: Tensor, y: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        top, shifted, label = _shifted(z, y, size)
        mean = shifted.sum(-1) / size
        # Around the maximum, from which a model's logits are a few standard deviations away: no digits are lost, and
        # unlike torch.std these are two plain passes.
        square = torch.linalg.vector_norm(shifted, dim=-1).square() - size * mean.square()
        bound = -n_sigma * (square.clamp(min=0.0) / max(1, size - 1)).sqrt()
        # A flat row (or one whose spread is not a number) keeps its maxima.
        bound = torch.where(bound < 0.0, bound, -torch.finfo(z.dtype).tiny).unsqueeze(-1)
        keep = torch.gt(shifted, bound, out=torch.empty_like(shifted))
        survivors = keep.sum(-1)
        ties = (shifted == 0).sum(-1) if lam == 0.0 else 0
        log_z = _log_normaliser(shifted.exp_(), z, top)
        kept_mass = keep.mul_(shifted).sum(-1)
        # The label's share of the filtered distribution; it may lie among the padded rows.
        inside = (label > bound.squeeze(-1)) & (y < size)
        filtered = torch.where(inside, label.exp(), 0.0) / kept_mass
        mass = lam + (1.0 - lam) * filtered
        # The greatest rival is the model's top token, or, where that is the label, one that is no greater without lam.
        leads = inside & (label == 0) & ((ties == 1) if lam == 0.0 else True)
        accepted = leads | ((label < 0) | ~inside) & (mass > (1.0 - lam) / kept_mass)
        others = (1.0 - lam) * (1.0 - filtered)
        spread = (math.log1p(-lam) if lam < 1.0 else 0.0) + log_z - kept_mass.log()
        mixture = others * spread + torch.xlogy(mass, mass) + mass * (log_z - label)
        divergence = torch.where(accepted, mixture, log_z - label)
        loss, active = clipped(divergence, epsilon)
        mass = torch.where(accepted, mass, 1.0)
        outputs = (loss, active, accepted, survivors.long(), mass)
        return outputs, (top, log_z, bound, torch.where(accepted, (1.0 - lam) / kept_mass, 0.0), accepted, active)

    def gradient(out: Tensor, z: Tensor, y: Tensor, *kept: Tensor) -> None:
        top, log_z, bound, share, accepted, active = kept
        shifted = _shift(out, z, top, log_z, size)
        # p - t is exp(shifted) times the same two numbers for all survivors and for all others, but for the label.
        factor = torch.gt(shifted, bound, out=torch.empty_like(shifted))
        factor.mul_(-share.unsqueeze(-1)).add_((-log_z).exp().unsqueeze(-1))
        shifted.exp_().mul_(factor)
        # Not where() of two numbers, which would be in fp32.
        own = torch.where(accepted, torch.full_like(log_z, lam), 1.0)
        _subtract_at(out, y, own, active)

    if lam == 1.0:
        # Cross-entropy to torch's last bit: a rounding apart, a half-precision run would not log what its host logs.
        with torch.no_grad():
            _, _, *statistics = rowwise(value, gradient, logits, labels)
        return *clipped(F.cross_entropy(wide(logits), labels, reduction="none"), epsilon), *statistics
    return rowwise(value, gradient, logits, labels)


def uniform(
    logits: Tensor, labels: Tensor, *, lam: float = 0.9, epsilon: float = 0.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Score tokens by uniform smoothing: :func:`uniform_target` and :func:`smoothed_loss`, without a target.

    Returns:
        loss [N] in nats, active [N] bool.
    """
    size = logits.shape[-1] if vocab_size is None else vocab_size
    share = (1.0 - lam) / size
    spread = share * math.log(share) if share > 0.0 else 0.0

    def value(z: Tensor, y: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        top, shifted, label = _shifted(z, y, size)
        # Nothing of minus infinity is nothing.
        flat = share * shifted.sum(-1) if share > 0.0 else 0.0
        log_z = _log_normaliser(shifted.exp_(), z, top)
        inside = (y < size).to(z.dtype)
        mass = lam + share * inside
        negative_entropy = torch.xlogy(mass, mass) + (size - inside) * spread
        divergence = negative_entropy + log_z - flat - lam * label
        loss, active = clipped(divergence, epsilon)
        return (loss, active), (top, log_z, active)

    def gradient(out: Tensor, z: Tensor, y: Tensor, top: Tensor, log_z: Tensor, active: Tensor) -> None:
        shifted = _shift(out, z, top, log_z, size)
        shifted.sub_(log_z.unsqueeze(-1)).exp_().sub_(share)
        _subtract_at(out, y, torch.full_like(log_z, lam), active)

    loss, active = rowwise(value, gradient, logits, labels)
    return loss, active


def clipped(divergence: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return ``max(divergence, epsilon)`` without a gradient where it is not above, and where it is."""
    # Written so that NaN counts as active: a model that diverged has not learned its tokens.
    active = ~(divergence <= epsilon)
    # Not clamp(min=): its gradient at equality is one, and a clipped token must have none.
    return torch.where(active, divergence, epsilon), active


def _shifted(z: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum of the true logits [n, 1], and minus it the true logits [n, size] and the label's logit [n]."""
    top = z[:, :size].amax(-1, keepdim=True)
    return top, z[:, :size] - top, (z.gather(-1, labels.unsqueeze(-1)) - top).squeeze(-1)


def _log_normaliser(exponentials: Tensor, z: Tensor, top: Tensor) -> Tensor:
    """Log of the softmax's denominator over all rows of the head, padded ones included, minus ``top``; [n]."""
    log_z = exponentials.sum(-1).log()
    padded = z[:, exponentials.shape[-1] :]
    return torch.logaddexp(log_z, (padded - top).logsumexp(-1)) if padded.shape[-1] else log_z


def _shift(out: Tensor, z: Tensor, top: Tensor, log_z: Tensor, size: int) -> Tensor:
    """Write the gradient of padded logits (their probabilities) and the true ones minus ``top``; return the latter."""
    if size < z.shape[-1]:
        torch.sub(z[:, size:], top + log_z.unsqueeze(-1), out=out[:, size:]).exp_()
    return torch.sub(z[:, :size], top, out=out[:, :size])


def _subtract_at(out: Tensor, labels: Tensor, mass: Tensor, active: Tensor) -> None:
    """Subtract the label's mass from its entry, and leave nothing where a token is not active."""
    out.scatter_add_(-1, labels.unsqueeze(-1), -mass.unsqueeze(-1))
    out.mul_(active.unsqueeze(-1))
