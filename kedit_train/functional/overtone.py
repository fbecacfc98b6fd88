"""OverTone: the target is a mixture of the label and the model's own filtered distribution.

No official code exists. Where the paper leaves a detail open, a comment in the code states the choice and its reason.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.functional.clipping import clipped
from kedit_train.functional.closed_form_losses import rowwise
from kedit_train.functional.precision import wide
from kedit_train.functional.softmax_rows import log_normalizer, shifted_logits, subtract_label, write_padded_gradient


def overtone_target(
    logits: Tensor, labels: Tensor, *, label_weight: float = 0.1, n_sigma: float = 0.5, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Build the target distribution of OverTone, without a gradient.

    The model's own distribution is reduced to the tokens with a logit above ``max - n_sigma * std``. This filtered
    distribution is mixed with the one-hot label. The mixture is the target if the label is strictly the most probable
    token of the mixture. Otherwise the one-hot label is the target.

    Args:
        logits: [N, V] at the positions that predict ``labels``, any float dtype.
        labels: [N] token ids.
        label_weight: weight of the one-hot label in the mixture, in [0, 1], as in the paper. With 1, the target is the
            one-hot label. In PyTorch, ``label_smoothing`` has the opposite meaning: it is the weight of the uniform
            distribution.
        n_sigma: width of the filter in standard deviations of the logits; ``inf`` keeps every token.
        vocab_size: size of the true vocabulary, if the output head has more rows (vocabulary padding). The logits of
            the padding do not count in the standard deviation and never pass the filter.

    Returns:
        Three tensors: the target [N, V] in fp32 (fp64 for fp64 logits), a bool tensor [N] that is True where the
        mixture is the target, and the number of tokens that pass the filter [N].

    References:
        - "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", arXiv 2502.00602, equation 2.
        - The filter: "Top-nσ: Not All Logits Are You Need", arXiv 2411.07641.
    """
    with torch.no_grad():
        logits = wide(logits)
        true = logits if vocab_size is None else logits[:, :vocab_size]
        # Tensor.std() of an empty tensor issues a warning.
        spread = true.std(-1, keepdim=True) if len(true) else true.new_zeros(0, 1)
        bound = true.amax(-1, keepdim=True) - n_sigma * spread
        # A logit must be strictly above the bound, as in the paper. A bound of -inf (n_sigma = inf) keeps every token.
        keep = logits > bound
        if vocab_size is not None:
            keep[:, vocab_size:] = False
        # If all logits are equal, no logit is strictly above the bound, and the filter keeps the greatest logits.
        keep |= (logits == true.amax(-1, keepdim=True)) & ~keep.any(-1, keepdim=True)
        mixture = logits.masked_fill(~keep, float("-inf")).softmax(-1).mul_(1.0 - label_weight)
        place = labels.unsqueeze(-1)
        mixture.scatter_add_(-1, place, torch.full_like(place, 1, dtype=mixture.dtype).mul_(label_weight))
        mass = mixture.gather(-1, place)
        rival = mixture.scatter(-1, place, -1.0).amax(-1, keepdim=True)
        accepted = mass > rival
        one_hot = torch.zeros_like(mixture).scatter_(-1, place, 1.0)
        return torch.where(accepted, mixture, one_hot), accepted.squeeze(-1), keep.sum(-1)


def overtone(
    logits: Tensor,
    labels: Tensor,
    *,
    label_weight: float = 0.1,
    epsilon: float = 0.05,
    n_sigma: float = 0.5,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the OverTone loss of each token, with the gradient in closed form.

    The result equals :func:`~kedit_train.functional.clipping.smoothed_loss` with the target of :func:`overtone_target`,
    but the target is not built. With ``label_weight=1`` and ``epsilon=0`` the loss is cross-entropy (proposition 3.1 of
    the paper). The defaults are the paper's values for LoRA (appendix B.1). For FT-M the paper uses ``epsilon=0.01``.

    Args:
        logits: [N, V] at the positions that predict ``labels``, any float dtype. The loss is computed in fp32 (in fp64
            for fp64 logits).
        labels: [N] token ids.
        label_weight: weight of the one-hot label in the mixture, in [0, 1].
        epsilon: threshold in nats. A token whose divergence is at most ``epsilon`` has no gradient.
        n_sigma: width of the filter in standard deviations of the logits; ``inf`` keeps every token.
        vocab_size: size of the true vocabulary, if the output head has more rows (vocabulary padding).

    Returns:
        The loss [N] in nats, and a bool tensor [N] that is True where the divergence is above ``epsilon``.

    References:
        "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", arXiv 2502.00602, algorithm 1.
    """
    loss, active, *_ = overtone_statistics(
        logits, labels, label_weight=label_weight, epsilon=epsilon, n_sigma=n_sigma, vocab_size=vocab_size
    )
    return loss, active


def overtone_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    label_weight: float,
    epsilon: float,
    n_sigma: float,
    vocab_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute the OverTone loss of each token, like :func:`overtone`, and also statistics of the targets.

    Let p be the model's distribution, and Z its log normalizer. Let f be the filtered distribution (p without unlikely
    tokens), and Z_f its log normalizer. If the label y is the most probable token of the mixture of f and the one-hot
    label, then the target t is this mixture. Otherwise t is the one-hot label.

    The loss is the divergence KL(t || p), a sum over the vocabulary. If t is the mixture, then the terms of all tokens
    except y add up to ``(1 - t_y) (log(1 - label_weight) + Z - Z_f)``, so the vocabulary is not looped over.

    Args:
        logits, labels, label_weight, epsilon, n_sigma, vocab_size: as for :func:`overtone`.

    Returns:
        Five tensors [N]: the loss in nats, whether the divergence is above ``epsilon`` (bool), whether the target is
        the mixture (bool), the number of tokens that pass the filter, and the probability of the label in the target.
    """
    size = logits.shape[-1] if vocab_size is None else vocab_size

    def value(z: Tensor, y: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        top, shifted, label = shifted_logits(z, y, size)
        mean = shifted.sum(-1) / size
        # The sums use distances to the maximum. Most logits are only a few standard deviations below the maximum, so no
        # digits are lost. Two plain passes are faster than torch.std.
        square = torch.linalg.vector_norm(shifted, dim=-1).square() - size * mean.square()
        bound = -n_sigma * (square.clamp(min=0.0) / max(1, size - 1)).sqrt()
        # If all logits are equal, or their spread is NaN, the filter keeps the greatest logits.
        bound = torch.where(bound < 0.0, bound, -torch.finfo(z.dtype).tiny).unsqueeze(-1)
        keep = torch.gt(shifted, bound, out=torch.empty_like(shifted))
        survivors = keep.sum(-1)
        ties = (shifted == 0).sum(-1) if label_weight == 0.0 else 0
        log_z = log_normalizer(shifted.exp_(), z, top)
        kept_mass = keep.mul_(shifted).sum(-1)
        # The label's probability in the filtered distribution. The label may be one of the padded rows.
        inside = (label > bound.squeeze(-1)) & (y < size)
        filtered = torch.where(inside, label.exp(), 0.0) / kept_mass
        mass = label_weight + (1.0 - label_weight) * filtered
        # If the label is the model's top token, the label leads the mixture, unless label_weight is 0 and another token
        # has the same logit. If the label is not the top token, the top token is its greatest rival.
        leads = inside & (label == 0) & ((ties == 1) if label_weight == 0.0 else True)
        accepted = leads | ((label < 0) | ~inside) & (mass > (1.0 - label_weight) / kept_mass)
        others = (1.0 - label_weight) * (1.0 - filtered)
        spread = (math.log1p(-label_weight) if label_weight < 1.0 else 0.0) + log_z - kept_mass.log()
        mixture = others * spread + torch.xlogy(mass, mass) + mass * (log_z - label)
        divergence = torch.where(accepted, mixture, log_z - label)
        loss, active = clipped(divergence, epsilon)
        mass = torch.where(accepted, mass, 1.0)
        outputs = (loss, active, accepted, survivors.long(), mass)
        share = torch.where(accepted, (1.0 - label_weight) / kept_mass, 0.0)
        return outputs, (top, log_z, bound, share, accepted, active)

    def gradient(out: Tensor, z: Tensor, y: Tensor, *kept: Tensor) -> None:
        top, log_z, bound, share, accepted, active = kept
        shifted = write_padded_gradient(out, z, top, log_z, size)
        # Apart from the label, p - t is exp(shifted) times a factor, which differs for kept and filtered tokens.
        factor = torch.gt(shifted, bound, out=torch.empty_like(shifted))
        factor.mul_(-share.unsqueeze(-1)).add_((-log_z).exp().unsqueeze(-1))
        shifted.exp_().mul_(factor)
        # torch.where() of two Python numbers would give fp32.
        own = torch.where(accepted, torch.full_like(log_z, label_weight), 1.0)
        subtract_label(out, y, own, active)

    if label_weight == 1.0:
        # Here the loss must equal torch's cross-entropy bit for bit. Otherwise, a rounding error would change the
        # logged loss in half precision.
        with torch.no_grad():
            _, _, *statistics = rowwise(value, gradient, logits, labels)
        return *clipped(F.cross_entropy(wide(logits), labels, reduction="none"), epsilon), *statistics
    return rowwise(value, gradient, logits, labels)
