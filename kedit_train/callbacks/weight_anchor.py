"""WeightAnchor: pull the weights back towards their values before the edit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kedit_train.arguments import at_least, check_arguments, integer_from, one_of, optional
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.anchor_weights import Anchor, AnchorWeights
from kedit_train.core.drift.factors_of_texts import check_no_adapters, factors_of_texts
from kedit_train.core.drift.fisher import diagonal_fisher, next_token_examples
from kedit_train.core.drift.kfac import KFACFactors
from kedit_train.core.drift.kronecker import divergence
from kedit_train.core.drift.linear_layers import LinearLayer, find_linear_layers
from kedit_train.core.fsdp import full_tensor, shard_like
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.precision import wide

Kind = Literal["l2sp", "ewc", "kfac"]
_DEFAULT_STRENGTH: dict[Kind, float] = {"l2sp": 2.0, "ewc": 1000.0, "kfac": 100.0}
# Sequences per forward and backward pass when the K-FAC factors are computed.
_BATCH_SIZE = 16


class WeightAnchor(EditCallback):
    """Pull the weights w in the scope towards their values w0 before the edit.

    The argument ``kind`` selects one of three penalties: "l2sp", "ewc" or "kfac".

    "l2sp" is the penalty ``strength / 2 * sum (w - w0)^2``. If a penalty is part of the loss, Adam rescales its
    gradient for each weight. By default, "l2sp" is therefore not part of the loss. Instead, a decoupled update follows
    each optimizer step, like the weight decay of AdamW: ``w`` becomes ``w - learning_rate * strength * (w - w0)``.

    "ewc" is the penalty ``strength / 2 * sum F (w - w0)^2``. F is the Fisher information per token on general texts,
    with labels sampled from the model. "kfac" is the penalty ``strength / 2 * tr(S D A Dᵀ)`` for the change D of each
    weight matrix. A is the second moment of the layer's inputs on the texts, and S is the second moment of the
    gradients at the layer's outputs. The penalties "ewc" and "kfac" are always part of the loss, and no text is read
    during training. They approximate ``strength`` times the KL divergence per token from the model before the edit, to
    second order. ``strength`` is therefore comparable to the ``weight`` of ``KLLocality``. "ewc" ignores all
    correlations between weights. "kfac" ignores correlations between different matrices, and assumes that the inputs
    and the output gradients of a layer are independent.

    The decoupled update is applied before ``LowCurvature``, ``NullSpace``, ``NormBall`` and ``GradientMask``. For
    adapters, w0 is the initial value of the adapter's own weights. ``ParameterScope`` trains half-precision weights in
    fp32, so that a small decoupled update is not lost in rounding.

    Args:
        kind: "l2sp" (default), "ewc" or "kfac". "l2sp" works with any module. "ewc" and "kfac" need a causal language
            model and ``texts``. With "kfac", only weights of ``nn.Linear`` and ``Conv1D`` can be in the scope. A and S
            are computed without the first token of every text, because it is an attention sink in many models.
        strength: strength of the penalty, >= 0. None (default) is 2 for "l2sp", 1000 for "ewc" and 100 for "kfac". The
            total effect of the decoupled updates in a run depends on learning rate * strength * number of steps. With
            "ewc", plain SGD diverges if learning rate * strength * F exceeds 2.
        texts: a source of general texts, or a :class:`Texts`. Only for "ewc" and "kfac". The ``seed`` of ``Texts``
            seeds the choice of sequences and the sampled labels.
        decoupled: only for "l2sp". True (default): a decoupled update follows each optimizer step. False: the penalty
            is added to the loss.
        anchor: the choice of w0 if you use this instance in several runs on one model. "base" (default): w0 are the
            weights before the first run. The penalty then also undoes the edits of the earlier runs. To preserve these
            edits, add ``KLLocality(sequential=True)``. "previous": w0 are the weights before the current run. In both
            cases, F, S and A are computed with the weights w0.
        limit: for "ewc" and "kfac": number of token sequences that are read. With "ewc", each sequence needs one
            backward pass. With "kfac", 16 sequences share one backward pass. None uses all sequences. Default 256.

    Logs ``edit/drift/anchor``, the penalty at the current weights.

    Raises:
        EditError: an argument is invalid. For a decoupled update: the optimizer has no learning rate, or learning rate
            * strength exceeds 1, which would move weights past w0. For "ewc" and "kfac": the model is not a causal
            language model. For "kfac": the scope contains parameters that are not supported.

    References:
        Explicit Inductive Bias for Transfer Learning with Convolutional Networks (L2-SP), arXiv 1802.01483.
        Overcoming catastrophic forgetting in neural networks (EWC), arXiv 1612.00796.
        Optimizing Neural Networks with Kronecker-factored Approximate Curvature (K-FAC), arXiv 1503.05671.

    Example:
        >>> import torch
        >>> from kedit_train.callbacks import WeightAnchor, editing
        >>> model = torch.nn.Linear(4, 2)
        >>> with editing(model, [WeightAnchor(strength=0.5)], log_every_n_steps=1) as run:
        ...     optimizer = torch.optim.Adam(run.parameters(), lr=0.1)
        ...     for _ in range(5):
        ...         run.before_step()
        ...         model(torch.ones(1, 4)).sum().backward()
        ...         optimizer.step()
        >>> run.history[-1]["edit/drift/anchor"] > 0
        True
    """

    order = 36
    # This is True even if the penalty is part of the loss, because the run keeps the reference weights only if a
    # callback constrains.
    constrains = True

    def __init__(
        self,
        kind: Kind = "l2sp",
        *,
        strength: float | None = None,
        texts: TextSource | Texts | None = None,
        decoupled: bool | None = None,
        anchor: Anchor = "base",
        limit: int | None = 256,
    ) -> None:
        check_arguments(
            self,
            kind=(kind, one_of(["l2sp", "ewc", "kfac"])),
            strength=(strength, optional(at_least(0))),
            anchor=(anchor, one_of(["base", "previous"])),
            limit=(limit, optional(integer_from(1))),
        )
        if kind != "l2sp" and texts is None:
            raise EditError(
                f"kind={kind!r} needs texts=; pass texts on which the model should not change.",
                component="WeightAnchor",
            )
        if kind == "l2sp" and texts is not None:
            raise EditError(
                "kind='l2sp' does not use texts=; remove texts=, or use kind='ewc' or kind='kfac'.",
                component="WeightAnchor",
            )
        if kind != "l2sp" and decoupled:
            raise EditError(
                f"decoupled must be None or False if kind={kind!r}, got True; remove decoupled, or use kind='l2sp'.",
                component="WeightAnchor",
            )
        self.kind: Kind = kind
        self.strength: float = _DEFAULT_STRENGTH[kind] if strength is None else strength
        self.texts: Texts | None = None if texts is None else Texts.of(texts)
        self.decoupled: bool = kind == "l2sp" if decoupled is None else decoupled
        self.anchor: Anchor = anchor
        self.limit = limit
        self.penalizes: bool = not self.decoupled
        self._run: EditRun | None = None
        self._anchors = AnchorWeights(anchor)
        self._fisher: dict[str, Tensor] = {}
        self._factors = KFACFactors({}, {})
        self._layers: dict[str, LinearLayer] = {}

    def prepare(self, run: EditRun) -> None:
        if self.texts is None:
            return
        if run.language_model is None:
            raise EditError(
                f"kind={self.kind!r} needs a causal language model, and {type(run.root).__name__} has no "
                "language-model head; use kind='l2sp'."
            )
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        self._run = run
        stored = self._anchors.start_run(run)
        if self.kind == "ewc":
            self._compute_fisher(run, stored)
        elif self.kind == "kfac":
            self._compute_factors(run, stored)

    def _compute_fisher(self, run: EditRun, stored: Sequence[str]) -> None:
        kept = {name: self._fisher[name] for name in stored if name in self._fisher}
        if self.texts is None or kept.keys() >= run.scope.keys():
            return
        examples = next_token_examples(self.texts.tokenize(run))
        self._fisher = diagonal_fisher(run, self._sampled(examples), seed=self.texts.seed) | kept

    def _compute_factors(self, run: EditRun, stored: Sequence[str]) -> None:
        self._layers = find_linear_layers(run.model, run.scope)
        check_no_adapters(self._layers)
        kept = self._factors.only(set(stored))
        missing = {name: layer for name, layer in self._layers.items() if name not in kept.inputs}
        if self.texts is None or not missing:
            return
        sequences = self._sampled(self.texts.tokenize(run))
        self._factors = kept | factors_of_texts(
            run, missing, sequences, seed=self.texts.seed, batch_size=_BATCH_SIZE, path=None, skip_first=True
        )

    def _sampled(self, sequences: Sequence[Any]) -> list[Any]:
        """Return ``limit`` random sequences, or all sequences if ``limit`` is None."""
        if self.limit is None or self.limit >= len(sequences):
            return list(sequences)
        assert self.texts is not None
        return random.Random(self.texts.seed).sample(sequences, self.limit)

    def penalty(self, run: EditRun) -> Tensor | None:
        return None if self.decoupled else self._penalty(run)

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.decoupled or self._run is None:
            return weights
        pulled = dict(weights)
        self._anchors.register(weights, reference)
        # A weight without a gradient, or a weight of another optimizer, has not moved and has no learning rate here.
        for name, rate in self._run.steps.learning_rates.items():
            if rate is None:
                raise EditError(
                    "the decoupled update after each step needs a learning rate, but the optimizer has none; set lr in "
                    "the optimizer, or use decoupled=False."
                )
            if rate * self.strength > 1.0:
                raise EditError(
                    f"learning rate * strength must be <= 1, got {rate:g} * {self.strength:g}, which would move "
                    f"{name!r} past its anchor weights; lower the learning rate or strength."
                )
            weight = wide(weights[name])
            step = rate * self.strength * (weight - wide(self._anchors[name]))
            pulled[name] = (weight - step).to(weights[name].dtype)
        return pulled

    @torch.no_grad()
    def metrics(self, run: EditRun) -> dict[str, float]:
        return {"edit/drift/anchor": float(self._penalty(run))} if self._run is run else {}

    def state(self) -> dict[str, Any]:
        anchors = self._anchors.state()
        # The Fisher information and the factors of these weights were computed before an earlier run. A new process
        # cannot compute them again.
        fisher = {name: full_tensor(information) for name, information in self._fisher.items() if name in anchors}
        return {"anchor_weights": anchors, "fisher": fisher, "factors": self._factors.only(set(anchors)).state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._anchors.load_state(state["anchor_weights"])
        self._fisher |= state["fisher"]
        # Checkpoints of earlier versions have no factors.
        factors = state.get("factors", KFACFactors({}, {}).state())
        self._factors |= KFACFactors.from_state(factors, state["anchor_weights"])

    def detach(self, run: EditRun) -> None:
        self._run = None
        self._anchors.end_run()
        self._layers = {}
        if not self._anchors.names():
            self._fisher, self._factors = {}, KFACFactors({}, {})

    def _penalty(self, run: EditRun) -> Tensor:
        self._anchors.register(run.scope, run.reference)
        terms = []
        for name, parameter in run.scope.items():
            change = wide(parameter) - wide(self._anchors[name])
            if self.kind == "kfac":
                matrix, factors = self._layers[name].as_matrix(change), self._factors
                # The sums are divided afterwards, so that no mean has to be stored.
                outputs, inputs = factors.gradients[name], factors.inputs[name]
                terms.append(divergence(matrix, outputs.sum / outputs.count, inputs.sum) / inputs.count)
                continue
            square = change.square()
            if self.kind == "ewc":
                square = shard_like(self._fisher[name].to(square.device), square) * square
            terms.append(0.5 * full_tensor(square.sum()))
        # The layers of a model may be on several devices.
        return self.strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def __repr__(self) -> str:
        return (
            f"WeightAnchor(kind={self.kind!r}, strength={self.strength}, decoupled={self.decoupled}, "
            f"anchor={self.anchor!r})"
        )
