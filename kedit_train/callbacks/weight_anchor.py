"""What must stay? The weights themselves, pulled back towards what they were before the edit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.anchor_weights import Anchor, Centres
from kedit_train.core.drift.fisher import contexts, diagonal_fisher
from kedit_train.core.fsdp import whole
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError

_STRENGTHS = {"l2sp": 2.0, "ewc": 1000.0}


class WeightAnchor(EditCallback):
    """Pull the scoped weights towards their values w0 before the edit, all alike or by how much other texts need them.

    "l2sp" (Explicit Inductive Bias for Transfer Learning with Convolutional Networks, arXiv 1802.01483) is the penalty
    ``strength/2 * sum (w - w0)^2``. Inside Adam its gradient would be rescaled by every weight's own history, so by
    default it is decoupled, as AdamW decouples weight decay: after each step ``w <- w - lr * strength * (w - w0)``.
    "ewc" (Overcoming catastrophic forgetting in neural networks, arXiv 1612.00796) is the penalty ``strength/2 * sum F
    (w - w0)^2`` with F the true Fisher information a token on general texts, labels drawn from the model: to second
    order, and but for correlations between weights, ``strength`` times the KL divergence a token from the unedited
    model on those texts, so that strengths compare with the weight of ``KLLocality``.

    Args:
        kind: "l2sp" (any module) or "ewc" (a causal language model and ``texts``).
        strength: alpha of L2-SP, lambda of EWC; None takes 2 and 1000, the most that still learned 90 % of the edits of
            both models of tests/benchmarks/constraints.py, keeping 20 and 18 points more of factlm's locality than no
            anchor; 10 and 10,000 keep more of the embedded world's, and learn 35 and 57 % of factlm's edits. What
            a decoupled pull does over a run goes by learning rate * alpha * steps: 0.7 did well on factlm, 1.2 in the
            world.
        texts: for "ewc", as in ``KLLocality``; those with a prompt that the edits (of the first run) are scored on are
            left out.
        decoupled: of "l2sp": None or true pulls after the step, false adds the penalty to the loss. "ewc" is always in
            the loss, to be weighed against it (plain SGD diverges where ``lr * strength * F`` exceeds 2).
        anchor: of runs that follow one another on the same model: "base" pulls towards the weights that this instance
            first met (and, of "ewc", by how much those mattered), so that what earlier runs moved needlessly goes as
            well; what they have learned goes with it, unless something holds it (``KLLocality(sequential=True)``).
            After 200 edits of the embedded world, one by one, it kept 0.75 of the other answers instead of 0.57; after
            300 of factlm it left 0.38 of the rephrasings instead of 0.63: a ball (``NormBall``) takes nothing before it
            binds. "previous" pulls towards the weights at the beginning of each run. Another model starts anew. "base"
            keeps a copy of the scope's first weights as long as this instance lives.
        samples: windows of the texts to take F from, drawn with ``seed``; None takes all. Each costs a backward pass.
        max_length: tokens a window.
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        seed: of the samples and labels.

    Of adapters it is the adapters' initial values that pull. In half precision a decoupled pull below half a unit in
    the last place would be rounded away; ``ParameterScope`` trains such a scope in fp32.
    """

    # Part of the step: what projections, balls and masks make of it comes after.
    order = 36
    # Also where it only adds a penalty: the run keeps the reference for those who constrain.
    constrains = True

    def __init__(
        self,
        kind: Literal["l2sp", "ewc"] = "l2sp",
        strength: float | None = None,
        texts: TextSource | Texts | None = None,
        decoupled: bool | None = None,
        anchor: Anchor = "base",
        samples: int | None = 256,
        max_length: int = 256,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        for name, value, good in (
            ("kind", kind, kind in ("l2sp", "ewc")),
            ("strength", strength, strength is None or 0.0 <= strength < float("inf")),
            ("anchor", anchor, anchor in ("base", "previous")),
            ("samples", samples, samples is None or samples > 0),
            ("max_length", max_length, max_length > 1),
        ):
            if not good:
                bounds = "kind l2sp|ewc, strength >= 0, anchor base|previous, samples > 0, max_length > 1"
                raise EditError(f"WeightAnchor: {name}={value!r} is out of bounds ({bounds})")
        if (texts is None) == (kind == "ewc"):
            given = "needs texts=" if texts is None else "does not read texts="
            raise EditError(f"WeightAnchor: kind={kind!r} {given}; they say what the weights of kind='ewc' matter for")
        if kind == "ewc" and decoupled:
            raise EditError("WeightAnchor: kind='ewc' is a penalty in the loss; leave decoupled out, or take 'l2sp'")
        self.kind: Literal["l2sp", "ewc"] = kind
        self.strength = _STRENGTHS[kind] if strength is None else strength
        self.texts = None if texts is None else Texts.of(texts, max_length=max_length, tokenizer=tokenizer, seed=seed)
        self.decoupled = kind == "l2sp" if decoupled is None else decoupled
        self.penalises = not self.decoupled
        self.samples, self.seed = samples, seed
        self._anchored: EditRun | None = None
        self._centres = Centres(anchor)
        self._fisher: dict[str, Tensor] = {}

    def prepare(self, run: EditRun) -> None:
        if self.kind != "ewc":
            return
        if run.language_model is None:
            raise EditError(
                f"WeightAnchor: kind='ewc' asks a causal language model for answers, and {type(run.root).__name__} has "
                "no language-model head; use kind='l2sp'"
            )
        assert self.texts is not None
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        self._anchored = run
        known = self._centres.begin(run)
        if self.kind == "ewc" and not set(known) & self._fisher.keys() >= run.scope.keys():
            assert self.texts is not None
            rows = contexts(self.texts.tokenize(run))
            if self.samples is not None and self.samples < len(rows):
                rows = random.Random(self.seed).sample(rows, self.samples)
            kept = {name: self._fisher[name] for name in known if name in self._fisher}
            self._fisher = diagonal_fisher(run, rows, seed=self.seed) | kept

    def penalty(self, run: EditRun) -> Tensor | None:
        return None if self.decoupled else self._distance(run)

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.decoupled or self._anchored is None:
            return weights
        pulled = dict(weights)
        self._centres.follow(weights, reference)
        # What had no gradient was not stepped, so it is not pulled either; nor is what another optimizer steps.
        for name, rate in self._anchored.steps.learning_rates.items():
            if rate is None:
                raise EditError(
                    "WeightAnchor: the optimizer has no learning rate of its own to decouple from (a relative step?); "
                    "set lr, or decoupled=False"
                )
            if rate * self.strength > 1.0:
                raise EditError(
                    f"WeightAnchor: lr * strength = {rate:g} * {self.strength:g} is above 1, which would throw {name} "
                    "beyond its anchor; lower one of them"
                )
            weight = _wide(weights[name])
            step = rate * self.strength * (weight - _wide(self._centres[name]))
            pulled[name] = (weight - step).to(weights[name].dtype)
        return pulled

    @torch.no_grad()
    def metrics(self, run: EditRun) -> dict[str, float]:
        """The penalty at the weights as they are, decoupled or not."""
        return {"edit/drift/anchor": float(self._distance(run))} if self._anchored is run else {}

    def state(self) -> dict[str, Any]:
        centres = self._centres.state()
        # Taken of the weights before an earlier run, which a new process does not have.
        fisher = {name: fisher for name, fisher in self._fisher.items() if name in centres}
        return {"centres": centres, "fisher": fisher}

    def load_state(self, state: dict[str, Any]) -> None:
        self._centres.load_state(state["centres"])
        self._fisher |= state["fisher"]

    def detach(self, run: EditRun) -> None:
        self._anchored = None
        self._centres.end()
        if not self._centres:
            self._fisher = {}

    def _distance(self, run: EditRun) -> Tensor:
        self._centres.follow(run.scope, run.reference)
        terms = []
        for name, parameter in run.scope.items():
            square = (_wide(parameter) - _wide(self._centres[name])).square()
            terms.append(
                whole((self._fisher[name].to(square.device) * square).sum() if self.kind == "ewc" else square.sum())
            )
        # Layers may lie on several devices.
        return 0.5 * self.strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def __repr__(self) -> str:
        return (
            f"WeightAnchor(kind={self.kind!r}, strength={self.strength}, decoupled={self.decoupled}, "
            f"anchor={self._centres.anchor!r})"
        )


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32: differences of half-precision weights lose what they are about."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
