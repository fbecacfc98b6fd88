"""How far may weights move? Freely where general behaviour hardly bends, not at all where it bends most."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.gradient_projection import project_gradients
from kedit_train.core.drift.kfac import curvature_factors
from kedit_train.core.drift.kfac_file import load_factors, save_factors
from kedit_train.core.drift.linear_layers import linear_maps
from kedit_train.core.drift.second_moments import Moment, same_everywhere
from kedit_train.core.fingerprint import fingerprint
from kedit_train.core.locality.consecutive_runs import check_known, goes_on
from kedit_train.core.locality.texts import Texts, TextSource, edit_rows
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.low_curvature import Curvature, high_curvature, project_low_curvature
from kedit_train.functional.precision import wide


class LowCurvature(EditCallback):
    """After every optimizer step, take out of the whole change the directions along which answers on texts bend most.

    CrispEdit (arXiv 2602.15823): an edit costs general ability ``vec(D)ᵀ G vec(D)``, with G the Gauss-Newton matrix of
    the cross-entropy on general texts, approximated as A (x) S for each weight (K-FAC). The pairs of eigenvectors that
    hold ``energy`` of its trace are taken out of D = W - W0. More may move than in a null space of the inputs: an
    input's direction is barred only together with outputs that matter. Here, unlike in the published code, the
    difference is projected after the step, as well as the gradient before it: the latter alone leaks under Adam, and
    without it Adam's scales would be those of what may not move. The projection is made in fp32, and G is the true
    Gauss-Newton matrix, with labels drawn from the model rather than read from the texts.

    What holds: the change has no part in the barred directions up to the rounding of the stored weights
    (``edit/drift/low_curvature_leak``), which in fp32 is below 1e-5 of the change for edits of ordinary size. A scope
    in bf16 or fp16 is trained in fp32 by ``ParameterScope``; rounding it at the end leaves 1/256 of each weight.

    Together with others: comes before ``NullSpace``, ``NormBall`` and ``GradientMask``, and is approximate behind any
    of them but a ball in L2 (see the metric).

    Args:
        texts: as of ``KLLocality``: general texts; the paper uses some 100 to 1,000.
        energy: share of the curvature that is barred, in (0, 1); the paper uses 0.8 to 0.99. With 0.9 factlm of
            tests/benchmarks/constraints.py learned as many edits as without and kept 7 points more of the locality
            (with 0.8 10 points: no difference at 60 probes); 0.99 learned 35 % while gradients were not projected.
        factors: a ``.safetensors`` file: read where it exists, written where not. It holds for one set of weights and
            texts and is refused for any other.
        sequential: several runs of this instance on the same model: after each, the curvature on its edits joins the
            average, token by token, and that of the texts is not taken anew.
        samples: the most texts to read; None reads all.
        batch_size: texts read together, with gradients.
        max_length: tokens a text; longer ones are cut into several, none is cut off.
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        seed: of the drawn labels, and of which ``samples`` are drawn.

    Costs once a forward and backward pass over the texts and eigendecompositions [d_in, d_in] and [d_out, d_out] in
    fp64; per step four products with the barred eigenvectors.

    Raises:
        EditError: no causal language model; the scope holds anything but weights of ``nn.Linear`` or ``Conv1D``, or
            LoRA factors (at B = 0 an adapter has no curvature), or the output head; a weight is sharded.
    """

    order = 40
    constrains = True
    single = "projecting twice undoes part of the first: give one of them all texts"

    def __init__(
        self,
        texts: TextSource | Texts,
        energy: float = 0.9,
        factors: str | None = None,
        sequential: bool = False,
        samples: int | None = None,
        batch_size: int = 4,
        max_length: int = 256,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        for name, value, good in (
            ("energy", energy, 0.0 < energy < 1.0),
            ("factors", factors, factors is None or str(factors).endswith(".safetensors")),
            ("samples", samples, samples is None or samples > 0),
            ("batch_size", batch_size, batch_size > 0),
            ("max_length", max_length, max_length > 0),
        ):
            if not good:
                bounds = "energy in (0, 1), factors a path to .safetensors, samples, batch_size and max_length > 0"
                raise EditError(f"LowCurvature: {name}={value!r} is out of bounds ({bounds})")
        self.texts = Texts.of(texts, max_length=max_length, tokenizer=tokenizer, seed=seed)
        self.energy, self.factors, self.sequential, self.samples = energy, factors, sequential, samples
        self.batch_size, self.max_length, self.tokenizer, self.seed = batch_size, max_length, tokenizer, seed
        self._running: tuple[dict[str, Moment], dict[str, Moment]] = {}, {}
        self._curvatures: dict[str, Curvature] = {}
        self._handles: list[Any] = []
        self._model: Any = None

    def prepare(self, run: EditRun) -> None:
        if run.language_model is None:
            run.head()
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        if self.sequential:
            check_known(run, "sequential=True takes this run's edits into the next one's curvature")
        self._maps = linear_maps(run.model, run.scope)
        if adapters := [name for name in self._maps if ".lora_A." in name or ".lora_B." in name]:
            raise EditError(
                f"LowCurvature: {adapters[0]} is the factor of an adapter, which has no curvature while B is zero; "
                "train the weight itself, or constrain the adapter with NullSpace"
            )
        if not (self.sequential and goes_on(self._model, run)):
            self._running = {}, {}
        self._model = weakref.ref(run.model)
        inputs, gradients = self._running if self._running[0] else self._on_texts(run)
        if inputs.keys() != self._maps.keys():
            raise EditError(
                "LowCurvature: sequential=True needs the same scope in every run; make a new LowCurvature for another"
            )
        if self.sequential:
            self._running = inputs, gradients
        self._curvatures = {name: self._decompose(run, name, gradients[name], inputs[name]) for name in self._maps}
        self._handles = project_gradients(
            self._maps, run.scope, lambda name, g: project_low_curvature(g, self._curvatures[name])
        )

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        projected = dict(weights)
        for name, curvature in self._curvatures.items():
            start = wide(reference[name])
            delta = self._maps[name].as_matrix(wide(weights[name]) - start)
            low = self._maps[name].as_matrix(project_low_curvature(delta, curvature))
            projected[name] = (start + low).to(weights[name].dtype)
        return projected

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Mean share of directions left free, mean share of curvature barred, and the change's share in barred ones."""
        if not self._curvatures:
            return {}
        number = len(self._curvatures)
        found = {
            "edit/drift/low_curvature_free": sum(c.free for c in self._curvatures.values()) / number,
            "edit/drift/low_curvature_barred": sum(c.energy for c in self._curvatures.values()) / number,
        }
        leaked, moved = 0.0, 0.0
        for name, curvature in self._curvatures.items():
            delta = wide(run.scope[name].detach()) - wide(run.reference[name])
            delta = self._maps[name].as_matrix(delta)
            leaked += float((delta - project_low_curvature(delta, curvature)).double().square().sum())
            moved += float(delta.double().square().sum())
        if moved:
            found["edit/drift/low_curvature_leak"] = (leaked / moved) ** 0.5
        return found

    def state(self) -> dict[str, Any]:
        curvatures = {name: found._asdict() for name, found in self._curvatures.items()}
        running = dict(zip(("inputs", "gradients"), self._running, strict=True))
        return {
            "curvatures": curvatures,
            "sums": {kind: {name: m.sum for name, m in moments.items()} for kind, moments in running.items()},
            "counts": {kind: {name: m.count for name, m in moments.items()} for kind, moments in running.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        # What the run began with: of earlier runs' edits nothing else is left.
        if state["curvatures"].keys() != self._curvatures.keys():
            raise EditError("LowCurvature: the checkpoint is of another scope; resume with the same ParameterScope")
        for name, own in self._curvatures.items():
            saved = Curvature(**state["curvatures"][name])
            # Copied: tensors out of a file lie at odd addresses, and products of matrices depend on that.
            left, right, high = (tensor.to(own.left, copy=True) for tensor in (saved.left, saved.right, saved.high))
            self._curvatures[name] = saved._replace(left=left, right=right, high=high)

        def moments(kind: str) -> dict[str, Moment]:
            counts = state["counts"][kind]
            return {n: Moment(s.to(self._curvatures[n].left), counts[n]) for n, s in state["sums"][kind].items()}

        self._running = moments("inputs"), moments("gradients")

    def finish(self, run: EditRun) -> None:
        if not self.sequential:
            return
        tokenizer = run.tokenizer(self.tokenizer)
        rows = edit_rows(run, run.edits, tokenizer, self.max_length)
        seen = self._take(run, rows, unedited=False)
        inputs, gradients = (
            {name: moment + more[name] for name, moment in running.items()}
            for running, more in zip(self._running, seen, strict=True)
        )
        self._running = inputs, gradients

    def detach(self, run: EditRun) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._curvatures = [], {}

    def _on_texts(self, run: EditRun) -> tuple[dict[str, Moment], dict[str, Moment]]:
        rows = self.texts.tokenize(run, limit=self.samples)
        if self.factors is None:
            return self._take(run, rows, unedited=True)
        with run.unedited():
            model = fingerprint(run.model, run.masters.dtypes if run.masters is not None else None)
        kept = load_factors(self.factors, {name: run.scope[name] for name in self._maps}, model, rows, self.seed)
        if kept is not None:
            return kept
        inputs, gradients = self._take(run, rows, unedited=True)
        if run.host.is_main:
            save_factors(self.factors, inputs, gradients, model, rows, self.seed)
        return inputs, gradients

    def _take(
        self, run: EditRun, rows: list[list[int]], *, unedited: bool
    ) -> tuple[dict[str, Moment], dict[str, Moment]]:
        return curvature_factors(
            run,
            self._maps,
            rows,
            batch_size=self.batch_size,
            seed=self.seed,
            unedited=unedited,
        )

    def _decompose(self, run: EditRun, name: str, gradients: Moment, inputs: Moment) -> Curvature:
        weight = run.scope[name]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        try:
            found = high_curvature(gradients.mean, inputs.mean, self.energy, dtype)
        except ValueError as error:
            raise EditError(
                f"LowCurvature: no gradient reaches {name} on the texts ({error}); leave it out of the scope"
            ) from error
        if found.free <= 0.0:
            raise EditError(f"LowCurvature: no direction of {name} is left free to move; lower energy={self.energy}")
        left, right, high = same_everywhere([t.to(weight.device) for t in (found.left, found.right, found.high)])
        return found._replace(left=left, right=right, high=high)

    def __repr__(self) -> str:
        return f"LowCurvature(energy={self.energy}, sequential={self.sequential})"
