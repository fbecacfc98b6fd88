"""LowCurvature: keep weights from moving in the directions that most affect predictions on given texts."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.arguments import BOOLEAN, check_arguments, integer_from, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.change_projection import ChangeProjection
from kedit_train.core.drift.factors_of_texts import check_no_adapters, factors_of_texts
from kedit_train.core.drift.kfac import KFACFactors, kfac_factors
from kedit_train.core.drift.linear_layers import LinearLayer, find_linear_layers
from kedit_train.core.drift.second_moments import SecondMoment, broadcast_from_first
from kedit_train.core.drift.sharded_projections import remove_high_curvature
from kedit_train.core.locality.consecutive_runs import continues_run, require_edits
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.locality.token_sequences import tokenize_edits
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.low_curvature import Curvature, high_curvature
from kedit_train.paths import SAFETENSORS_PATH


class LowCurvature(EditCallback):
    """Keep each weight from moving in the directions that most affect predictions on given texts.

    This is the constraint of CrispEdit. ``D = W - W0`` is the change of a weight W from its value W0 before the edit,
    and ``vec(D)ᵀ G vec(D)`` estimates how much D harms general ability. G is the Gauss-Newton matrix of the
    cross-entropy on general texts. For each weight, G is approximated as a Kronecker product of two K-FAC factors.

    After every optimizer step, D is projected: its components along the eigenvectors of G with the largest eigenvalues
    are removed. These eigenvectors are selected in descending order of their eigenvalues until the selected eigenvalues
    add up to at least ``energy`` times the trace of G. Eigenvectors with the same eigenvalue as the last selected one
    are selected, too.

    ``LowCurvature`` leaves more freedom for the edit than ``NullSpace``. It removes pairs of one input direction and
    one output direction. ``NullSpace`` removes an input direction for all outputs.

    ``LowCurvature`` differs from the published code of CrispEdit in two details. First, the published code projects
    only the gradient before the step. ``LowCurvature`` also projects D after the step, because an Adam step with a
    projected gradient can leave the allowed subspace. Second, the published code uses the empirical Fisher matrix.
    ``LowCurvature`` samples the labels from the model, so G is the true Gauss-Newton matrix. The projection is computed
    in fp32.

    The constraint is exact up to the rounding of the stored weights. ``edit/drift/low_curvature_leak`` is the fraction
    of the change that still lies in removed directions. In fp32, this fraction is below 1e-5 for edits of ordinary
    size. ``ParameterScope`` trains bf16 and fp16 weights in fp32. Rounding these weights at the end of training adds an
    error of up to 1/256 of each weight.

    The projection is applied before ``NullSpace``, ``NormBall`` and ``GradientMask``. ``NullSpace``, ``GradientMask``
    and ``NormBall(norm="linf")`` make the constraint approximate. With ``NormBall(norm="l2")``, the constraint remains
    exact.

    Args:
        texts: a source of general texts, or a :class:`Texts`. The ``seed`` of ``Texts`` also seeds the sampled labels.
            The paper uses about 100 to 1,000 texts.
        energy: fraction of the curvature (the trace of G) that is removed, in (0, 1). Default 0.9; the paper uses 0.8
            to 0.99. A higher value preserves more behavior and leaves less freedom for the edit.
        factors_path: a ``.safetensors`` file for the K-FAC factors. If the file exists, the factors are read from it.
            If not, the factors are computed and written to it. A file is valid only for the weights, texts and
            labels from which its factors were computed.
        sequential: whether consecutive runs of this instance on one model preserve earlier edits. After each run, the
            factors of the run's edits are added to the factors of the texts, weighted by the number of tokens. The
            texts are read only in the first run.
        limit: maximum number of texts to read. None (default) reads all texts.
        batch_size: number of sequences per forward and backward pass. Default 4.

    Three metrics are logged:

    - ``edit/drift/low_curvature_free``: mean fraction of the directions that remain free.
    - ``edit/drift/low_curvature_removed``: mean fraction of the curvature that is removed.
    - ``edit/drift/low_curvature_leak``: norm of the change in removed directions, divided by the norm of the change.

    Raises:
        EditError: an argument is invalid; the model is not a causal language model; or the scope contains parameters
            that are not supported. Only weights of ``nn.Linear`` and ``Conv1D`` are supported. LoRA matrices are not
            supported, because B is zero before training, so A has no curvature. The output head is not supported.

    References:
        CrispEdit, arXiv 2602.15823.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import LowCurvature, ParameterScope
        >>> model, tokenizer = world.load()
        >>> edit = EditDataset.load("world", limit=1)[0]
        >>> batch = tokenizer(f"{edit.prompt} {edit.target}", return_tensors="pt")
        >>> callbacks = [ParameterScope(0.7, modules="mlp.down_proj.weight"), LowCurvature("world", limit=64)]
        >>> with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as run:
        ...     optimizer = torch.optim.Adam(run.parameters(), lr=1e-3)
        ...     run.before_step()
        ...     model(**batch, labels=batch["input_ids"]).loss.backward()
        ...     optimizer.step()
        >>> run.history[-1]["edit/drift/low_curvature_leak"] < 1e-4
        True
    """

    order = 40
    constrains = True
    duplicate_hint: str | None = "a second projection undoes part of the first, so pass all texts to one LowCurvature"

    def __init__(
        self,
        texts: TextSource | Texts,
        *,
        energy: float = 0.9,
        factors_path: str | Path | None = None,
        sequential: bool = False,
        limit: int | None = None,
        batch_size: int = 4,
    ) -> None:
        check_arguments(
            self,
            energy=(energy, within("(0, 1)")),
            factors_path=(factors_path, optional(SAFETENSORS_PATH)),
            limit=(limit, optional(integer_from(1))),
            batch_size=(batch_size, integer_from(1)),
            sequential=(sequential, BOOLEAN),
        )
        self.texts: Texts = Texts.of(texts)
        self.energy = energy
        self.factors_path = factors_path
        self.sequential = sequential
        self.limit = limit
        self.batch_size = batch_size
        self._projection = ChangeProjection({}, {}, remove_high_curvature)
        self._accumulated: KFACFactors | None = None
        self._model: weakref.ref[nn.Module] | None = None

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        if self.sequential:
            require_edits(run, "sequential=True preserves the edits of this run during later runs")
        layers = find_linear_layers(run.model, run.scope)
        check_no_adapters(layers)
        if not (self.sequential and continues_run(self._model, run)):
            self._accumulated = None
        self._model = weakref.ref(run.model)
        factors = self._accumulated or self._factors_of_texts(run, layers)
        if factors.inputs.keys() != layers.keys():
            raise EditError(
                "sequential=True needs the same scope in every run; create a new LowCurvature for the new scope."
            )
        if self.sequential:
            self._accumulated = factors
        curvatures = {
            name: self._decompose(run, name, factors.gradients[name], factors.inputs[name]) for name in layers
        }
        self._projection = ChangeProjection(layers, curvatures, remove_high_curvature)
        self._projection.start(run.scope)

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._projection.constrain(weights, reference)

    def metrics(self, run: EditRun) -> dict[str, float]:
        curvatures: list[Curvature] = list(self._projection.subspaces.values())
        if not curvatures:
            return {}
        metrics = {
            "edit/drift/low_curvature_free": sum(c.free for c in curvatures) / len(curvatures),
            "edit/drift/low_curvature_removed": sum(c.energy for c in curvatures) / len(curvatures),
        }
        leak = self._projection.leak(run.scope, run.reference)
        return metrics if leak is None else {**metrics, "edit/drift/low_curvature_leak": leak}

    def state(self) -> dict[str, Any]:
        accumulated = self._accumulated or KFACFactors({}, {})
        return {"subspaces": self._projection.state(), "factors": accumulated.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        # A resumed run cannot recompute the factors of previous edits, so it restores the factors of the original run.
        self._projection.load_state(state["subspaces"])
        curvatures = self._projection.subspaces
        factors = KFACFactors.from_state(state["factors"], {name: c.left for name, c in curvatures.items()})
        self._accumulated = factors if factors.inputs else None

    def finish(self, run: EditRun) -> None:
        if self._accumulated is None:
            return
        settings = self.texts
        sequences = tokenize_edits(run, run.edits, run.tokenizer(settings.tokenizer), settings.max_length)
        edited = kfac_factors(
            run, self._projection.layers, sequences, batch_size=self.batch_size, seed=settings.seed, unedited=False
        )
        self._accumulated = self._accumulated + edited

    def detach(self, run: EditRun) -> None:
        self._projection.stop()

    def _factors_of_texts(self, run: EditRun, layers: Mapping[str, LinearLayer]) -> KFACFactors:
        sequences = self.texts.tokenize(run, limit=self.limit)
        return factors_of_texts(
            run, layers, sequences, seed=self.texts.seed, batch_size=self.batch_size, path=self.factors_path
        )

    def _decompose(self, run: EditRun, name: str, gradients: SecondMoment, inputs: SecondMoment) -> Curvature:
        weight = run.scope[name]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        try:
            curvature = high_curvature(gradients.mean, inputs.mean, self.energy, dtype)
        except ValueError as error:
            raise EditError(
                f"no gradient reaches {name} on the texts ({error}); remove this weight from the scope."
            ) from error
        if curvature.free <= 0.0:
            raise EditError(
                f"energy={self.energy} removes every direction of {name}, so the weight could not move; use a lower "
                "energy."
            )
        on_device = [t.to(weight.device) for t in (curvature.left, curvature.right, curvature.high)]
        left, right, high = broadcast_from_first(on_device)
        return curvature._replace(left=left, right=right, high=high)

    def __repr__(self) -> str:
        return f"LowCurvature(energy={self.energy}, sequential={self.sequential})"
