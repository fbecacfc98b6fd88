"""Towards what is each token pulled? OverTone's smoothed, clipped targets in place of one-hot cross-entropy."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.processes import is_distributed
from kedit_train.core.run import EditRun
from kedit_train.core.tokens.loss_head import Reduction
from kedit_train.errors import EditError
from kedit_train.functional.dft import dynamic_cross_entropy
from kedit_train.functional.overtone import overtone_statistics, uniform

Target = Literal["overtone", "uniform", "dft", "prompt_last"]


class TokenSmoothing(EditCallback):
    """Train each target token only until it is learned, towards a target that leaves the model its other beliefs.

    OverTone ("Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing", arXiv 2502.00602): the target of a
    token mixes the one-hot label with the model's own filtered distribution, recomputed at every step, where the label
    wins that mixture; a token whose divergence from its target is within ``epsilon`` has no gradient. Where no token of
    an optimizer step is active, and no penalty such as ``KLLocality`` pulls, the step is left out: the weights and the
    optimizer's state stay as they are.

    Replaces the host's loss at the supervised positions during training; evaluation losses stay the host's own.
    ``TokenSmoothing(lam=1.0, epsilon=0.0)`` is cross-entropy.

    Args:
        lam: mass of the one-hot label in [0, 1]; 0.1 in the paper (the reverse of label smoothing's convention).
        epsilon: clip in nats; 0.05 in the paper with LoRA, 0.01 with plain fine-tuning of one layer.
        n_sigma: width of the filter in standard deviations of the logits; 0.5 in the paper, 1 with larger memories.
        reduction: "token" weighs all supervised tokens alike, as the hosts do; "sample" all sequences alike, as
            FT-M and LocFT do (it matters where targets differ in length).
        target: "overtone"; "uniform": plain label smoothing with mass ``1 - lam`` spread over the vocabulary; or "dft":
            the label alone, each token's loss times the model's own probability for it ("On the Generalization of SFT:
            A Reinforcement Learning Perspective with Reward Rectification", arXiv 2508.05629; there ``epsilon`` is 0);
            or "prompt_last": cross-entropy of every target token on the last prompt position's distribution, FT-L's
            legacy objective (EasyEdit's ``prompt_last``), which teaches the answer's tokens and not their order.
    """

    order = 20
    single = "a token can have one target only: keep one"

    def __init__(
        self,
        lam: float = 0.1,
        epsilon: float = 0.05,
        n_sigma: float = 0.5,
        reduction: Reduction = "token",
        target: Target = "overtone",
    ) -> None:
        for name, value, good in (
            ("lam", lam, 0.0 <= lam <= 1.0),
            ("epsilon", epsilon, epsilon >= 0.0),
            ("n_sigma", n_sigma, n_sigma > 0.0),
            ("reduction", reduction, reduction in ("token", "sample")),
            ("target", target, target in get_args(Target)),
        ):
            if not good:
                bounds = "0 <= lam <= 1, epsilon >= 0, n_sigma > 0, reduction token|sample, target " + "|".join(
                    get_args(Target)
                )
                raise EditError(f"TokenSmoothing: {name}={value!r} is out of bounds ({bounds})")
        for name, value, default, readers in (
            ("lam", lam, 0.1, ("overtone", "uniform")),
            ("n_sigma", n_sigma, 0.5, ("overtone",)),
        ):
            if target not in readers and value != default:
                raise EditError(f"TokenSmoothing: target={target!r} does not read {name}={value!r}; leave it out")
        self.lam, self.epsilon, self.n_sigma = lam, epsilon, n_sigma
        self.reduction: Reduction = reduction
        self.target = target

    def provides(self) -> set[str]:
        clip = {"token_clip", "edit/tokens/active_now"} if self.epsilon > 0.0 else set()
        return {"token_loss", "edit/tokens/loss_now"} | clip

    def prepare(self, run: EditRun) -> None:
        if run.language_model is None:
            run.head()
        reason = run.host.objective_refused()
        if reason:
            raise EditError(f"TokenSmoothing cannot replace the loss of this {run.host.name} run: {reason}")

    def attach(self, run: EditRun) -> None:
        head = run.head()
        self._vocab_size = self._true_vocabulary(run, head.config.vocab_size)
        self._totals: dict[str, Tensor] = {}
        self._tokens, self._counted_at = 0, -1
        # Active tokens, the sum of the tokens' losses, and tokens, of the current step.
        self._now = torch.zeros(3, dtype=torch.float64)
        position = "first" if self.target == "prompt_last" else "own"
        run.loss_head().use(self.score, reduction=self.reduction, position=position, observe=self._observe)

    def score(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Score tokens: loss [N], active [N], and the statistics that are logged, [N] each."""
        if self.target == "dft":
            return dynamic_cross_entropy(logits, labels, epsilon=self.epsilon)
        if self.target == "prompt_last":
            return uniform(logits, labels, lam=1.0, epsilon=self.epsilon)
        options = {"lam": self.lam, "epsilon": self.epsilon, "vocab_size": self._vocab_size}
        if self.target == "uniform":
            return uniform(logits, labels, **options)
        return overtone_statistics(logits, labels, n_sigma=self.n_sigma, **options)

    def skip_step(self, run: EditRun) -> bool:
        if self._counted_at != run.step:
            raise EditError(
                "TokenSmoothing: the model was not called with labels= since the last optimizer step, so its loss was "
                "not replaced; let the training step call model(..., labels=labels) and use the loss that it returns, "
                "and let one optimizer step the whole scope"
            )
        # Reading the loss waits for the device, so it is read only where a callback needs it.
        publishes_loss = run.is_required("edit/tokens/loss_now")
        if self.epsilon == 0.0 and not publishes_loss:
            return False
        now = self._now
        if is_distributed():
            # Every rank has to come to the same decision.
            now = now.clone()
            dist.all_reduce(now)
        active, loss, tokens = now.tolist()
        run.publish({"edit/tokens/active_now": active})
        if publishes_loss:
            run.publish({"edit/tokens/loss_now": loss / max(1.0, tokens)})
        return self.epsilon > 0.0 and active == 0.0

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Shares of tokens that were active and whose mixture was accepted, survivors and label mass per token."""
        if not self._tokens:
            return {}
        found = {f"edit/tokens/{name}": float(total) / self._tokens for name, total in self._totals.items()}
        self._totals, self._tokens = {}, 0
        return found

    def _observe(self, active: Tensor, loss: Tensor, *statistics: Tensor) -> None:
        run = self.run
        if self._counted_at != run.step:
            self._now, self._counted_at = torch.zeros(3, dtype=torch.float64, device=active.device), run.step
        self._now[0] += active.sum()
        self._now[1] += loss.sum()
        self._now[2] += len(active)
        self._tokens += len(active)
        for name, values in zip(("active", "accepted", "survivors", "label_mass"), (active, *statistics), strict=False):
            self._totals[name] = self._totals.get(name, 0.0) + values.sum(dtype=torch.float32)

    @staticmethod
    def _true_vocabulary(run: EditRun, head_size: int) -> int | None:
        """The tokenizer's size where the head has rows beyond it: those logits are noise and would widen the filter."""
        try:
            size = len(run.tokenizer())
        except EditError:
            return None
        return size if size < head_size else None

    def __repr__(self) -> str:
        own = "" if self.target == "overtone" else f", target={self.target!r}"
        own += "" if self.reduction == "token" else f", reduction={self.reduction!r}"
        return f"TokenSmoothing(lam={self.lam}, epsilon={self.epsilon}, n_sigma={self.n_sigma}{own})"
