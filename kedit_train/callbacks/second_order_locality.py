"""SecondOrderLocality: take steps that change predictions on given texts as little as possible."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from kedit_train.arguments import above, check_arguments, integer_from, one_of, optional
from kedit_train.callbacks.polyak_step import PolyakStep, have_finite_squares
from kedit_train.core.cache.sequence_keys import hash_sequences
from kedit_train.core.drift.factors_of_texts import check_no_adapters, factors_of_texts
from kedit_train.core.drift.kfac import KFACFactors
from kedit_train.core.drift.kronecker import divergence, transform_matrix
from kedit_train.core.drift.linear_layers import LinearLayer, find_linear_layers
from kedit_train.core.drift.second_moments import broadcast_from_first
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.run import EditRun
from kedit_train.core.training_format import warn_without_chats
from kedit_train.errors import EditError
from kedit_train.functional.precision import wide
from kedit_train.functional.second_order import inverse_root
from kedit_train.paths import SAFETENSORS_PATH


class SecondOrderLocality(PolyakStep):
    """Replace each optimizer step by a step that changes predictions on given texts as little as possible.

    Before training, the callback reads the texts and computes two K-FAC factors for each weight matrix. A is the second
    moment of the layer's inputs, and S is the second moment of the gradients at the layer's outputs. If the weight
    changes by D, the predictions on the texts change by an estimated KL divergence of ``1/2 tr(S D A Dᵀ)`` per token.
    During training, no text is read.

    After each optimizer step, the change that the optimizer made is discarded. Instead, the callback takes a step of
    Adam in transformed coordinates. A step U in these coordinates changes the weight by ``S^-1/2 U A^-1/2``. The
    estimated divergence of such a change depends only on the norm of U.

    The length of a step does not depend on the optimizer or on its learning rate. The gradient predicts how much a step
    of a given length reduces the loss. The callback chooses the length for which the predicted reduction is
    ``step_size`` times the loss (Polyak's step size, with running averages of loss and gradient). A step is never
    longer than a tenth of the norm of the weights in scope. A learning rate schedule has no effect.

    Other callbacks act as usual. A penalty such as ``KLLocality`` is part of the gradient. Constraints such as
    ``NormBall``, ``NullSpace`` and ``GradientMask`` are applied after the step.

    Args:
        texts: a source of texts on which predictions should stay the same, or a :class:`Texts`. The gradients for S are
            computed with labels that are sampled from the model's predictions. The ``seed`` of ``Texts`` is also the
            seed of this sampling. The first token of every text is left out of the factors, because it is an attention
            sink in many models.
        step_size: how much each step should reduce the training loss, as a fraction of the loss, in (0, 1]. The
            reduction is predicted from the gradient. A smaller value preserves more behavior. However, training needs
            more steps, and the model gives the new answer to fewer rephrased prompts. Default 0.03.
        damping: added to the diagonal of each factor, after the factor was divided by the mean of its diagonal. With a
            high damping (10), the steps are close to those of plain Adam with a Polyak step size. Default 1e-2.
        factors: "kfac" (default) or "inputs". "inputs" uses the identity matrix for S, so the texts need no backward
            pass.
        factors_path: a ``.safetensors`` file for the factors. If the file exists, the factors are read from it.
            If not, the factors are computed and written to it. A file is valid only for the weights, texts and
            labels from which its factors were computed.
        limit: maximum number of texts to read. None (default) reads all texts.
        batch_size: number of sequences per forward and backward pass when the factors are computed. Default 8.

    Logs ``edit/locality/second_order_kl``, the estimated KL divergence from the reference model in nats per token,
    summed over the weights. With ``factors="inputs"``, nothing is logged.

    Raises:
        EditError: an argument is invalid; no callback computes the loss (add ``TokenLoss``); the model is not a causal
            language model; or the scope contains parameters that are not supported. Only weights of ``nn.Linear`` and
            ``Conv1D`` are supported. LoRA matrices and the output head are not supported.

    References:
        Optimizing Neural Networks with Kronecker-factored Approximate Curvature, arXiv 1503.05671. SOAP: Improving and
        Stabilizing Shampoo using Adam, arXiv 2409.11321, for Adam in the coordinates of Kronecker factors. MoMo:
        Momentum Models for Adaptive Learning Rates, arXiv 2305.07583, for Polyak's step size with momentum.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import ParameterScope, SecondOrderLocality, TokenLoss
        >>> model, tokenizer = world.load()
        >>> edit = EditDataset.load("world", limit=1)[0]
        >>> batch = tokenizer(f"{edit.prompt} {edit.target}", return_tensors="pt")
        >>> callbacks = [
        ...     ParameterScope(0.7, modules="mlp.down_proj.weight"),
        ...     TokenLoss("cross_entropy"),
        ...     SecondOrderLocality("world", limit=64),
        ... ]
        >>> with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as run:
        ...     optimizer = torch.optim.SGD(run.parameters(), lr=1.0)
        ...     run.before_step()
        ...     model(**batch, labels=batch["input_ids"]).loss.backward()
        ...     optimizer.step()
        >>> run.history[-1]["edit/locality/second_order_kl"] > 0
        True
    """

    duplicate_hint: str | None = (
        "the second one would replace the step of the first, so pass all texts to one SecondOrderLocality"
    )

    def __init__(
        self,
        texts: TextSource | Texts,
        *,
        step_size: float = 0.03,
        damping: float = 1e-2,
        factors: Literal["kfac", "inputs"] = "kfac",
        factors_path: str | Path | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(step_size)
        check_arguments(
            self,
            damping=(damping, above(0)),
            factors=(factors, one_of(["kfac", "inputs"])),
            factors_path=(factors_path, optional(SAFETENSORS_PATH)),
            limit=(limit, optional(integer_from(1))),
            batch_size=(batch_size, integer_from(1)),
        )
        self.texts: Texts = Texts.of(texts)
        self.damping = damping
        self.factors = factors
        self.factors_path = factors_path
        self.limit = limit
        self.batch_size = batch_size
        self._layers: dict[str, LinearLayer] = {}
        self._moments = KFACFactors({}, {})
        self._roots: dict[str, tuple[Tensor | None, Tensor]] = {}
        self._texts_hash = ""

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        self._layers = find_linear_layers(run.model, run.scope)
        check_no_adapters(self._layers)
        sequences = self.texts.tokenize(run, limit=self.limit)
        warn_without_chats(run, run.tokenizer(self.texts.tokenizer), sequences)
        self._texts_hash = hash_sequences(sequences)
        self._moments = factors_of_texts(
            run, self._layers, sequences, seed=self.texts.seed, batch_size=self.batch_size, path=self.factors_path,
            inputs_only=self.factors == "inputs", skip_first=True,
        )  # fmt: skip
        self._roots = {name: self._inverse_roots(run, name) for name in self._layers}
        super().attach(run)

    def coordinates(self, name: str, gradient: Tensor) -> Tensor:
        return transform_matrix(self._layers[name].as_matrix(gradient), *self._roots[name])

    def change(self, name: str, direction: Tensor) -> Tensor:
        return self._layers[name].as_matrix(transform_matrix(direction, *self._roots[name]))

    def describe_overflow(self, gradients: Mapping[str, Tensor], step: int) -> str:
        if have_finite_squares(gradients.values()):
            return self._damping_is_too_small(f"the squared gradients of step {step}")
        return super().describe_overflow(gradients, step)

    def _damping_is_too_small(self, overflowing: str) -> str:
        return (
            f"damping={self.damping:g} is too small: {overflowing} exceed the largest number of their dtype; use a "
            "larger damping, such as the default."
        )

    def metrics(self, run: EditRun) -> dict[str, float]:
        if self.factors == "inputs" or not self._layers:
            return {}
        estimate = 0.0
        for name, layer in self._layers.items():
            change = layer.as_matrix(wide(run.scope[name].detach()) - wide(run.reference[name]))
            outputs, inputs = self._moments.gradients[name].mean, self._moments.inputs[name].mean
            estimate += float(divergence(change, outputs, inputs))
        return {"edit/locality/second_order_kl": estimate}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "coordinates": self._coordinates()}

    def load_state(self, state: dict[str, Any]) -> None:
        if state.get("coordinates") != self._coordinates():
            raise EditError(
                "the checkpoint was written with other texts, damping or factors; resume with the texts, limit=, "
                "damping= and factors= of the run that wrote the checkpoint, or start a new run."
            )
        super().load_state(state)

    def _coordinates(self) -> dict[str, Any]:
        """Return the settings that must be the same in a resumed run, and the hash of the texts."""
        factors = {"damping": self.damping, "factors": self.factors, "seed": self.texts.seed}
        return {"texts": self._texts_hash, **factors}

    def detach(self, run: EditRun) -> None:
        super().detach(run)
        self._layers, self._roots, self._moments = {}, {}, KFACFactors({}, {})

    def _inverse_roots(self, run: EditRun, name: str) -> tuple[Tensor | None, Tensor]:
        moments = [self._moments.inputs[name]]
        if self.factors == "kfac":
            moments.append(self._moments.gradients[name])
        try:
            roots = [inverse_root(moment.mean, self.damping) for moment in moments]
        except ValueError as error:
            raise EditError(
                f"no activation or gradient reaches {name} on the texts ({error}); remove this weight from the scope."
            ) from error
        if not all(bool(root.isfinite().all()) for root in roots):
            raise EditError(self._damping_is_too_small(f"the inverse roots of the factors of {name}"))
        # Every process must take the same step, but the last bits of a matrix root may differ between processes.
        inputs, *outputs = broadcast_from_first([root.to(run.scope[name].device) for root in roots])
        return (outputs[0] if outputs else None), inputs

    def __repr__(self) -> str:
        return f'SecondOrderLocality(step_size={self.step_size}, damping={self.damping}, factors="{self.factors}")'
